"""Runs of the methods with a companion: skipped, resumed, captured and accumulated steps, what is kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.cohort.companion import by_dtype
from fastokd.distributed.ranks import Ranks
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator
from fastokd.learner.captured import CapturedStep
from fastokd.learner.step import step, training_step
from fastokd.learner.student_parallel import StudentParallel
from fastokd.methods import Progress, create_method
from fastokd.methods.okdph import DRAWN
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.session import Session
from fastokd.student.file import student_of
from tests.learner.every_method import Recorder
from tests.learner.test_guard import BAD, digest, go, poison_gradient, session_of

SETTINGS: dict[str, dict[str, Any]] = {
    "pcl": {},
    "okdph": {"hybrid": "dirichlet", "gap": 2, "gamma": 0.5, "omega": 0.8},
}
METHODS = list(SETTINGS)


def small(method: str, **changes: Any) -> Recipe:
    settings = {"epochs": 4, "students": 3, "batch_size": 6, **SETTINGS[method], **changes}
    return recipe(f"{method}/resnet8/digits", **settings)


def beside(session: Session) -> Cohort:
    companion = session.learner.cohort.companion
    assert companion is not None
    networks = companion.networks
    assert isinstance(networks, Cohort)
    return networks


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_no_trace_and_a_resumed_run_has_the_same_bits(method: str) -> None:
    whole, begun, hurt, resumed = (session_of(small(method)) for _ in range(4))
    go(whole)
    poison_gradient(hurt)
    with pytest.raises(UserError, match="step 3 "):
        go(hurt, steps=BAD + 2)
    go(begun, steps=BAD)
    assert digest(hurt) == digest(begun)
    resumed.load_state(*begun.state())
    go(resumed)
    assert digest(resumed) == digest(whole)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_part_of_a_captured_step(method: str) -> None:
    plain, captured = (session_of(small(method)) for _ in range(2))
    graphs = CapturedStep(
        partial(step, captured.learner), captured.learner.device, Recorder(), warm_up=2
    )
    for session, run in ((plain, partial(training_step, plain.learner)), (captured, graphs)):
        session.learner.train()
        torch.manual_seed(0)
        for _ in range(4):
            session.begin_epoch()
            images, labels = session.next_batch()
            session.begin_step(len(labels))
            run(images, labels)
            session.finish_step()
    ours, theirs = (x.learner.method.state_dict() for x in (captured, plain))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_the_eager_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, which runs as it was traced, without code generation."""
    torch._dynamo.reset()
    graphs, real = [], torch.compile

    def traced(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda body, **how: real(body, backend=traced, **how))
    eager = session_of(small(method, students=2))
    compiled = session_of(small(method, students=2), compile=True)
    for session in (eager, compiled):
        go(session, steps=3)
    assert len(graphs) == 1
    ours, theirs = (x.state()[0] for x in (compiled, eager))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    cohort = compiled.learner.cohort
    assert cohort.companion is not None
    cohort.companion.due.fill_(1)
    cohort(torch.zeros(2, 3, 8, 8))
    assert cohort.companion.due == 0  # one that isn't compiled refreshes it itself


def test_parts_of_a_batch_share_one_hybrid() -> None:
    """Its weights are the drawn means of the students before the step, not of those after it."""
    session = session_of(small("okdph", fusion="none"), accumulate=2)
    go(session, steps=2)
    before = [p.clone() for p in session.learner.cohort.parameters()]
    share_S = session.learner.method.companion.shares(torch.float32)  # type: ignore[union-attr, operator]
    go(session, steps=3)
    expected = [
        sum((r * p for r, p in zip(share_S, parts, strict=True)), torch.zeros(()))
        for parts in zip(
            *(before[s * len(before) // 3 :][: len(before) // 3] for s in range(3)), strict=True
        )
    ]
    for ours, value in zip(beside(session).parameters(), expected, strict=True):
        torch.testing.assert_close(ours, value)
    counts = [v for k, v in beside(session).state_dict().items() if "num_batches" in k]
    assert counts[0] == 6  # two parts a step


def test_draws_are_the_same_for_each_image_of_a_batch() -> None:
    method = create_method(
        "okdph", Cohort(("resnet8", 3), 10, sharing="network").shape, hybrid="dirichlet"
    )
    first, second = (method.draw(4, torch.Generator().manual_seed(s))[DRAWN] for s in (0, 1))
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(1), torch.ones(4))


@pytest.mark.parametrize("method", METHODS)
def test_the_companion_is_kept_and_raw_keeps_a_student(method: str) -> None:
    session = session_of(small(method))
    go(session, steps=2)
    tensors, facts = session.state()
    same(student_of(Path("x"), tensors, facts, []).state, beside(session).student_state(0))
    facts["recipe"] = small(method, keep="raw").to_json()
    same(student_of(Path("x"), tensors, facts, []).state, session.learner.cohort.student_state(0))
    measured = {"companion_top1": 0.5, "mean_top1": 0.4, "student_top1": [0.3] * 3}
    assert small(method).score(measured) == 0.5
    assert small(method, keep="raw").score(measured) == 0.4


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_initial_weights_are_the_published_ones() -> None:
    def weights(method: str, **changes: Any) -> tuple[Tensor, Tensor]:
        cohort = session_of(small(method, **changes)).learner.cohort
        key = "fc.weight" if method == "pcl" else "conv1.weight"
        first, second = (cohort.student_state(index)[key] for index in (0, 1))
        return first, second

    assert torch.equal(*weights("pcl"))
    assert not torch.equal(*weights("pcl", equal_heads=False))
    assert torch.equal(*weights("okdph"))
    assert not torch.equal(*weights("okdph", diff_init=True))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("pcl", {"ramp": "none"}, "choose recipe or published_code"),
        ("pcl", {"decay": 1.5}, "at most 1"),
        ("okdph", {"omega": 1.5}, "at least 0 and at most 1"),
        ("okdph", {"fusion": "step"}, "choose batch, epoch or none"),
        ("okdph", {"hybrid": "dir"}, "choose mean or dirichlet"),
    ],
)
def test_bad_options_are_one_sentence(method: str, options: dict[str, Any], words: str) -> None:
    sharing = "branch" if method == "pcl" else "network"
    shape = Cohort(("resnet8", 2), 10, sharing=sharing).shape
    with pytest.raises(UserError, match=words):
        create_method(method, shape, **options)


def test_what_cannot_work_is_refused() -> None:
    mixed = Cohort(["resnet8", "resnet14"], 10, sharing="network")
    with pytest.raises(UserError, match="name one model for all"):
        create_method("okdph", mixed.shape)
    cohort = Cohort(("resnet8", 2), 10, sharing="network")
    method = create_method("okdph", cohort.shape)
    with pytest.raises(UserError, match="use --parallel data"):
        StudentParallel(cohort, method, Ranks(), "fp32", "okdph")
    with pytest.raises(UserError, match="2 students and a companion"):
        cohort(torch.zeros(2, 4, 3, 32, 32))
    with pytest.raises(UserError, match="give one for each"):
        small("okdph", view_kinds="plain+none")
    with pytest.raises(UserError, match="words of plain"):
        small("okdph", view_kinds="sharp")


def test_a_fusion_in_a_run_makes_students_equal() -> None:
    """Their running statistics, too, which the guard of a step holds."""
    session = session_of(small("okdph", students=2, hybrid="mean", gamma=1.0, gap=1))
    go(session, steps=3)
    one, other = (session.learner.cohort.student_state(s) for s in (0, 1))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_tied_weight_is_averaged_once() -> None:
    x, y = torch.full((2,), 3.0), torch.full((2,), 5.0)
    (pairs,) = by_dtype([x, x], [y, y])
    assert [len(one) for one in pairs] == [1, 1]


def test_the_score_is_of_the_kept_companion(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(small("pcl", reported="kept", seed=3))
    top1, kept = [0.1, 0.2, 0.3], session.recipe.kept_student
    assert kept != 0
    evaluator = Evaluator(session)
    scores = {"student_top1": top1, "student_top5": [0.4, 0.5, 0.6]}
    monkeypatch.setattr(evaluator, "_score", lambda scorer, between: {"test": dict(scores)})
    assert evaluator()["test"]["companion_top1"] == top1[kept]


def test_another_method_removes_the_companion() -> None:
    cohort = Cohort(("resnet8", 2), 10, sharing="network")
    okdph = create_method("okdph", cohort.shape)
    assert cohort.companion is not None
    method = create_method("dml", cohort.shape)
    assert cohort.companion is None
    out, labels_B = cohort(torch.zeros(4, 3, 8, 8)), torch.arange(4)
    method(out, labels_B, Progress.start()).total.backward()
    with pytest.raises(UserError, match="no other method after it"):
        okdph(out, labels_B, Progress.start())
