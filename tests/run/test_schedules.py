"""Schedules, optimizers and frozen stages in a run: the rates of its steps, and a resumed run's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.cohort import Choice
from fastokd.errors import UserError
from fastokd.learner.step import training_step
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import BATCH, Session

QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "impl": "torch", "quiet": True}
BY_STEP = {
    "schedule": "cosine",
    "schedule_by": "step",
    "warmup": "over",
    "warmup_epochs": 1.0,
    "warmup_lr": 1e-4,
}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "head_lr": 0.01}
LAMB = {"optimizer": "lamb", "lr": 0.01, "weight_decay": 0.02, "decay_norms": False}
FROZEN = {"frozen_stages": 2, "frozen_epochs": 1}


def small(name: str = "dml-network/resnet8/digits", **changes: Any) -> Recipe:
    """Two steps an epoch."""
    return recipe(name, **{"epochs": 2, "batch_size": 50, "students": 2, **changes})


def session_of(of: Recipe, engine: str = "loop", **options: Any) -> Session:
    return build(of, RunOptions(**{**QUICK, "engine": engine, **options}))


def epoch(session: Session) -> list[list[float]]:
    """Trains an epoch; the rates that the optimizers had in each step."""
    learner = session.learner
    learner.train()
    session.begin_epoch()
    rates = []
    for B, *batch in session.batches(lambda: None):
        training_step(learner, B, *batch, body=session.whole_step)
        rates.append([float(g["lr"]) for o in learner.optimizers for g in o.param_groups])
        session.finish_step()
    session.finish_epoch()
    return rates


def test_each_step_has_its_rate() -> None:
    of = small(head_lr=0.02, **BY_STEP)
    session = session_of(of)
    for number in range(2):
        expected = [of.learning_rate(number, step=step, steps=2) for step in range(2)]
        for (body, head), rate in zip(epoch(session), expected, strict=True):
            assert body == pytest.approx(rate, rel=1e-6)
            assert head == pytest.approx(rate * 0.2, rel=1e-6)


def test_rates_follow_the_position() -> None:
    """After a jump, and within a step outside of the loop."""
    session = session_of(small(epochs=3, **BY_STEP))
    session.epoch, session.batch, session.step = 2, 1, 5
    assert epoch(session)[0][0] == pytest.approx(
        session.recipe.learning_rate(2, step=1, steps=2), rel=1e-6
    )
    session.epoch, session.batch = 1, 1
    session.begin_step(50)
    (group,) = session.learner.optimizers[0].param_groups
    assert float(group["lr"]) == pytest.approx(
        session.recipe.learning_rate(1, step=1, steps=2), rel=1e-6
    )


def test_rates_by_epoch_aren_t_drawn() -> None:
    """A step of the default recipe has the row of its batch, and nothing else."""
    session = session_of(small())
    assert next(session._ahead(50)).keys() == {BATCH}


def state_of(folder: Path) -> dict[str, Tensor]:
    return newest_checkpoint(folder / "checkpoints")[1]


@pytest.mark.parametrize(
    ("settings", "cut"),
    [({**BY_STEP, **LAMB}, 1), ({**BY_STEP, **ADAMW}, 3), (FROZEN, 1), ({**LAMB, **FROZEN}, 3)],
    ids=["lamb", "adamw", "within the frozen epoch", "after it"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    settings: dict[str, Any], cut: int, tmp_path: Path
) -> None:
    of = small(**settings)
    whole = fastokd.train(of, out=tmp_path / "whole", engine="loop", **QUICK)
    fastokd.train(of, out=tmp_path / "cut", engine="loop", max_steps=cut, **QUICK)
    fastokd.resume(tmp_path / "cut", quiet=True)
    mine, other = state_of(whole.folder), state_of(tmp_path / "cut")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert whole.last["lr"] == of.learning_rate(1, step=1, steps=2)


def test_a_schedule_that_ends_is_not_made_longer(tmp_path: Path) -> None:
    of = small("baseline/resnet8/digits", students=1, schedule="cosine")
    fastokd.train(of, out=tmp_path / "run", engine="loop", max_steps=1, **QUICK)
    with pytest.raises(UserError, match=r"its schedule cosine ends: begin a longer run"):
        fastokd.resume(tmp_path / "run", epochs=4, quiet=True)


def frozen(session: Session) -> set[str]:
    names = session.learner.cohort.named_parameters()
    return {name.partition(".")[2] for name, p in names if not p.requires_grad}


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_a_frozen_stage_does_not_change(engine: str, sharing: str) -> None:
    """Neither weights nor running statistics, until its epochs are over; all engines agree."""
    stages = 3 if sharing == "branch" else 2  # the trunk and a stage of the branches
    of = small(
        f"dml-{sharing}/resnet8/digits", frozen_stages=stages, frozen_epochs=1, weight_decay=0.1
    )
    session = session_of(of, engine)
    cohort = session.learner.cohort
    inside = [
        f"{'trunk' if part is cohort.trunk else f'students.{s}'}.{name}."
        for s, part in ((s, part) for part in (cohort.trunk,) if part for s in (0,))
        for name in part.body(stages)
    ]
    inside += [f"students.{s}.{n}." for s in range(2) for n in cohort.students[s].body(stages)]  # type: ignore[operator]
    before = {name: x.clone() for name, x in cohort.state_dict().items()}

    def changed() -> dict[str, bool]:
        now = cohort.state_dict()
        return {name: not torch.equal(x, now[name]) for name, x in before.items()}

    epoch(session)
    for name, is_changed in changed().items():
        assert is_changed != name.startswith(tuple(inside)), name
    epoch(session)
    assert all(changed().values())


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_engines_agree_on_frozen_stages(engine: str) -> None:
    ours, theirs = (session_of(small(**FROZEN), one) for one in ("loop", engine))
    for session in (ours, theirs):
        session.learner.cohort.double()
        session.learner.adopt(session.learner.choice)
        epoch(session)
    other = theirs.learner.cohort.state_dict()
    for name, x in ours.learner.cohort.state_dict().items():
        torch.testing.assert_close(x, other[name], rtol=0, atol=1e-9)


def test_only_heads() -> None:
    session = session_of(small(frozen_stages=-1, frozen_epochs=2))
    trained = [n for n, p in session.learner.cohort.named_parameters() if p.requires_grad]
    assert trained == [f"students.{s}.fc.{kind}" for s in range(2) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("model", "stages", "trained"),
    [
        ("torchvision:resnet18", 1, {"layer2", "layer3", "layer4", "fc"}),
        ("torchvision:resnet18", 3, {"layer4", "fc"}),
        ("torchvision:resnet18", -1, {"fc"}),
    ],
)
def test_another_librarys_stages(model: str, stages: int, trained: set[str]) -> None:
    of = small(f"baseline/{model}/digits", students=1, frozen_stages=stages, frozen_epochs=1)
    session = session_of(of)
    cohort = session.learner.cohort
    named = [(name.split(".")[3], p) for name, p in cohort.named_parameters()]
    assert {name for name, p in named if p.requires_grad} == trained
    assert {name for name, p in named if not p.requires_grad} | trained == {n for n, _ in named}
    cohort.train()
    norms = [
        (name.split(".")[3], module.training)
        for name, module in cohort.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert {name for name, training in norms if training} == trained - {"fc"}


def test_more_stages_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="frozen_stages is 9, but resnet8 has 4 stages"):
        fastokd.train(small(frozen_stages=9, frozen_epochs=1), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_compiled_or_captured_step_is_made_anew() -> None:
    """Its graph has the gradients of one set of parameters."""
    session = session_of(small(**FROZEN))
    learner = session.learner
    adopted: list[Choice] = []
    learner.adopt = adopted.append  # type: ignore[method-assign, assignment]
    session.begin_epoch()
    assert not adopted
    session.epoch = 1
    session.begin_epoch()
    assert adopted == [learner.choice]
    session.begin_epoch()
    assert len(adopted) == 1
    assert not frozen(session)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"optimizer": "lamb"},
            "it replaces sgd only, and the optimizer is lamb: leave --apex out",
        ),
        ({"schedule_by": "step"}, "schedule_by is step: leave --apex out"),
    ],
)
def test_apex_has_sgd_only(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastokd.learner.optimizers.apex_missing", lambda: None)
    with pytest.raises(UserError, match=says):
        session_of(small(**changes), apex=True)


def test_a_run_that_was_begun_with_apex_under_its_earlier_name(tmp_path: Path) -> None:
    from fastokd.run.identity import begun_with

    (tmp_path / "environment.json").write_text('{"optimizer": "apex-sgd"}')
    begun = begun_with(tmp_path, RunOptions())
    assert RunOptions().as_begun(begun, tmp_path).apex
    (tmp_path / "environment.json").write_text('{"optimizer": "sgd"}')
    assert not RunOptions().as_begun(begun_with(tmp_path, RunOptions()), tmp_path).apex
