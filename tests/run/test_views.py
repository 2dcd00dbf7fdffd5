"""Runs whose students have a view each: from the recipe to the step, resumed, accumulated, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastokd
from fastokd.benchmark.loops import OurLoop, PublishedLoop
from fastokd.benchmark.step import step_macs
from fastokd.checkpoint import newest_checkpoint
from fastokd.cohort import Choice
from fastokd.data import BatchStream
from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.learner.learner import TAUGHT
from fastokd.learner.step import training_step
from fastokd.plan.trace import trace_ours
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import out_of_memory
from fastokd.run.build import build
from fastokd.run.display import show_batch
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.trial import job, trial_here
from fastokd.run.tuning import step_key
from tests.learner.every_method import Recorder, small
from tests.learner.test_sync_free import NoWaits

QUICK: dict[str, Any] = {
    **{"device": "cpu", "precision": "fp32", "engine": "loop", "impl": "torch"},
    "quiet": True,
}


def viewed(method: str = "dml", sharing: str = "network", **changes: Any) -> Recipe:
    return small(method, sharing, views="student", **changes)


def session_of(one: Recipe, **options: Any) -> Session:
    session = build(one, RunOptions(**{**QUICK, **options}))
    session.learner.cohort.double()
    session.learner.method.double()
    session.learner.train()
    return session


def stepped(session: Session, steps: int = 2) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The logits of some steps of the loop, and the weights after them."""
    session.begin_epoch()
    logits = []
    for _, batch in zip(range(steps), session.batches(lambda: None), strict=False):
        found, _ = training_step(session.learner, *batch, body=session.whole_step)
        logits.append(found.clone())
        session.finish_step()
    return logits, {k: v.clone() for k, v in session.learner.cohort.state_dict().items()}


def test_a_step_trains_each_student_on_its_own_view() -> None:
    """As the cohort over the stream's views, whose draws are those of the recipe's seed."""
    session = session_of(viewed())
    images, labels = session.next_batch()
    assert images.shape == (3, 6, 32, 32, 3)
    assert not torch.equal(images[0], images[1])
    expected = session.learner.cohort(images).logits_SBC
    (found,), _ = stepped(session_of(viewed()), 1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)
    shared = session_of(small("dml", "network"))
    assert torch.equal(shared.next_batch()[0], images[0])
    assert torch.equal(shared.next_batch()[1], labels)


def test_train_metrics_are_each_students_on_its_own_view() -> None:
    session = session_of(viewed(batch_size=50))
    labels = session.next_batch()[1]
    (logits,), _ = stepped(session, 1)
    metrics = session.meter.result(session.learner.ranks)
    right = (logits.argmax(2) == labels).double().mean(1)
    assert metrics["student_top1"] == pytest.approx(right.tolist())


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_engines_train_alike(sharing: str, engine: str) -> None:
    one = viewed("okddip", sharing)
    wanted = stepped(session_of(one))[1]
    for name, value in stepped(session_of(one, engine=engine))[1].items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_trunk_over_all_views_is_another_run() -> None:
    each, every = (
        stepped(session_of(viewed("okddip", "branch", trunk_views=how)))[1]
        for how in ("each", "all")
    )
    assert int(each["trunk.bn1.num_batches_tracked"]) == 6
    assert int(every["trunk.bn1.num_batches_tracked"]) == 2
    assert not torch.allclose(each["trunk.conv1.weight"], every["trunk.conv1.weight"], rtol=1e-9)


def test_parts_of_a_batch_have_their_part_of_every_view() -> None:
    """Accumulated in eval mode, where a norm doesn't look at the batch."""

    def trained(accumulate: int) -> dict[str, Tensor]:
        session = session_of(viewed(), accumulate=accumulate)
        session.learner.train(False)
        return stepped(session)[1]

    whole = trained(1)
    for name, value in trained(3).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", ["okddip", "kdcl"])
def test_a_step_with_views_reads_nothing_back(method: str) -> None:
    session = build(
        viewed(method, "network"), RunOptions(**{**QUICK, "precision": "bf16", "accumulate": 2})
    )
    session.learner.train()
    session.begin_epoch()
    for batch in session.batches(lambda: None):
        with NoWaits() as watch:
            training_step(session.learner, *batch, body=session.whole_step)
        session.finish_step()
        assert watch.ops > 100
        if session.step == 2:
            break


def test_a_captured_step_draws_new_views_in_every_replay() -> None:
    """A stand-in for the graph runs the same body; logits and weights are the eager run's."""
    eager = stepped(session_of(viewed()), 4)
    session = session_of(viewed())
    recorder = Recorder()
    captured = CapturedStep(
        lambda *batch: session.whole_step(session.learner, *batch),
        torch.device("cpu"),
        recorder,
        warm_up=2,
    )
    session.begin_epoch()
    logits = []
    for _, batch in zip(range(4), session.batches(lambda: None), strict=False):
        logits.append(captured(*batch)[0].double())
        session.finish_step()
    assert recorder.replays == [2]
    for found, wanted in zip(logits, eager[0], strict=True):  # the stand-in keeps them in float32
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for name, value in session.learner.cohort.state_dict().items():
        assert torch.equal(value, eager[1][name]), name


def test_all_views_of_an_image_are_mixed_alike_and_augmented_apart() -> None:
    """Mixup's partner and share are one for all views; the operations are drawn for each."""
    one = viewed(mixup=0.8, auto_augment="trivialaugment", random_erasing=0.5)
    session = session_of(one)
    session.learner.train(False)
    images, labels = session.next_batch()
    mixed, _ = session.mixed(images, labels)
    assert session.mixing is not None
    mix_6B = session._mixed_as(6, 0)
    for view in range(3):
        assert torch.equal(mixed[view], session.mixing(mix_6B, images[view], labels)[0])
    wanted = session.learner.cohort(mixed).logits_SBC.detach()
    again = session_of(one)
    again.learner.train(False)
    (found,), _ = stepped(again, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_run_that_stops_between_batches_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    one = recipe(
        "okddip-branch/resnet8/digits",
        students=2,
        epochs=1,
        batch_size=25,
        milestones=[1],
        views="student",
        auto_augment="randaugment",
        cutmix=1.0,
    )
    whole = fastokd.train(one, out=tmp_path / "whole", **QUICK)
    fastokd.train(one, out=tmp_path / "cut", max_steps=2, **QUICK)
    fastokd.resume(tmp_path / "cut", **QUICK)
    ours, theirs = (
        newest_checkpoint(tmp_path / name / "checkpoints")[1] for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((whole.folder / "recipe.json").read_text())["views"] == "student"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ffsd", {"views": "student"}, "ffsd compares the students' maps place by place"),
        ("dml", {"views": "student", "trunk_views": "all"}, "a network form has no trunk"),
        ("okddip-branch", {"trunk_views": "all"}, "the trunk sees one view"),
        ("baseline", {"views": "student"}, "one network sees the images"),
        ("dml", {"views": "students"}, "views is 'students': choose shared or student"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(f"{name}/resnet8/digits", **changes)


def test_the_teacher_has_a_view_of_its_own(tmp_path: Path) -> None:
    base = fastokd.train(
        recipe("baseline/resnet8/digits", epochs=1, batch_size=50, milestones=[1]),
        out=tmp_path / "teacher",
        **QUICK,
    )
    session = session_of(viewed("kd", "network", students=2), teacher=(str(base.folder),))
    images, _ = session.next_batch()
    assert images.shape[0] == 3
    teacher = session.learner.cohort.teacher
    assert teacher is not None
    out = session.learner.cohort(images)
    assert out.extra_logits_EBC is not None
    cohort = session.learner.cohort
    x_BCHW = (images[2].double() * cohort.scale_C + cohort.shift_C).permute(0, 3, 1, 2)
    torch.testing.assert_close(out.extra_logits_EBC[0], teacher(x_BCHW), rtol=1e-9, atol=1e-9)


def test_cached_logits_of_a_teacher_are_of_the_images_of_every_view(tmp_path: Path) -> None:
    """The teacher then has no view."""
    base = fastokd.train(
        recipe("baseline/resnet8/digits", epochs=1, batch_size=50, milestones=[1]),
        out=tmp_path / "teacher",
        max_steps=1,
        **QUICK,
    )
    one = viewed("kd", "network", students=2, cache_teacher="plain")
    session = session_of(one, teacher=(str(base.folder),))
    assert session.next_batch()[0].shape[0] == 2
    assert isinstance(session.stream, BatchStream)
    index_B = session.stream.draws(0, 0).index_B
    assert session.taught_NC is not None
    stepped(session, 1)
    taught_BC = session.learner.progress.draws[TAUGHT]
    assert torch.equal(taught_BC, session.taught_NC[index_B])
    session.begin_step(6)
    assert session.learner.progress.draws[TAUGHT].shape == taught_BC.shape


def test_the_picture_of_a_batch_shows_an_images_views_side_by_side(tmp_path: Path) -> None:
    from torchvision.io import read_image

    session = session_of(viewed())
    pixels = read_image(str(show_batch(session, tmp_path)))
    images, _ = session.next_batch()
    pitch = 34  # images of 32 with a margin of 2
    for view in range(3):
        tile = pixels[:, 2:pitch, 2 + view * pitch : 2 + view * pitch + 32]
        assert torch.equal(tile.permute(1, 2, 0), images[view, 0])


def test_a_batch_that_does_not_fit_is_halved_in_every_view() -> None:
    session = session_of(viewed())
    images, labels = session.next_batch()
    shapes: list[tuple[int, ...]] = []

    def gradients(learner: Any, images: Tensor, labels: Tensor) -> None:
        shapes.append((*images.shape[:2], *labels.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_of_memory, "gradients", gradients)
        assert out_of_memory._largest_half(session, images, labels, 6) == 3
    assert shapes == [(3, 3, 3)]


def test_timings_of_steps_with_views_are_kept_apart() -> None:
    shared, views = (
        step_key(session_of(small("dml", "network", views=which)))
        for which in ("shared", "student")
    )
    assert shared["views"] == [None, "each"]
    assert views["views"] == [3, "each"]
    told = job(session_of(viewed()), Choice("loop", False))
    assert told["data"]["image"] == [32, 32, 3]
    answer, _ = trial_here(told)
    assert answer["step_ms"] > 0


@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_the_benchmark_steps_over_views(sharing: str) -> None:
    one = viewed("okddip", sharing)
    loop = OurLoop(one, RunOptions(**QUICK))
    assert loop.images_BHWC.shape == (3, 6, 32, 32, 3)
    assert not torch.equal(loop.images_BHWC[0], loop.images_BHWC[1])
    assert loop.step().isfinite()
    with pytest.raises(UserError, match="sets views, which the published loop doesn't take"):
        PublishedLoop.drawn(one, RunOptions(**QUICK))


def test_a_trunk_over_views_is_counted_once_for_each() -> None:
    """The loop's traced products are as many as its students' whole networks have."""
    network, branch = (
        small("okddip", sharing, views="student") for sharing in ("network", "branch")
    )
    assert step_macs(branch) == step_macs(network)
    shared = small("okddip", "branch")
    assert step_macs(shared) < step_macs(branch)
    found = [trace_ours(one, 6, "loop", "fp32", "torch").flops for one in (shared, branch, network)]
    assert found[0] < found[1]
    assert found[1] == pytest.approx(found[2], rel=0.02)
