"""Mixed images and labels in a run: what the loss gets, resumed, captured, on disk, in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data import BatchStream, DiskStream
from fastokd.data.disk.prepare import prepare
from fastokd.data.mixing import dominant
from fastokd.errors import UserError
from fastokd.methods import Progress
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.identity import continues
from fastokd.run.options import RunOptions
from fastokd.run.session import MIXING, Session
from tests.data.make import write_folder
from tests.run.mixed import MixedCE, mixed_recipe
from tests.run.test_one_replay import go, loop_of, same

# Five steps an epoch; the last has 20 images.
SMALL: dict[str, Any] = {"epochs": 4, "batch_size": 24, "students": 2}


def session_of(one: Recipe, *, captured: bool = False, **options: Any) -> Session:
    return loop_of(one, torch.device("cpu"), captured=captured, **options)


def seen(session: Session, epochs: int = 1) -> list[tuple[Tensor, ...]]:
    """Images, labels, second labels, shares and logits of every part of the steps of some epochs."""
    found: list[tuple[Tensor, ...]] = []

    def images_of(_module: Any, args: tuple[Tensor]) -> None:
        found.append((args[0],))

    def labels_of(_module: Any, args: tuple[Any, Tensor, Progress]) -> None:
        out, labels_B, progress = args
        assert progress.mixed_with is not None
        found[-1] += (labels_B, *progress.mixed_with, out.logits_SBC.detach())

    session.learner.cohort.register_forward_pre_hook(images_of)
    session.learner.method.register_forward_pre_hook(labels_of)
    go(session, epochs=epochs)
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mix_each", [False, True])
def test_the_loss_gets_the_mixed_images_and_both_labels(mix_each: bool, accumulate: int) -> None:
    """Those that stream and draws give when the batch is made again, by itself; also of its parts."""
    session = session_of(
        mixed_recipe(mix_each=mix_each, mix_epochs=1, **SMALL), accumulate=accumulate
    )
    found = seen(session, epochs=2)
    assert session.mixing is not None
    assert isinstance(session.stream, BatchStream)
    mixed = 0
    for number in range(10):
        epoch, index = divmod(number, 5)
        images, labels_B = session.stream.batch(epoch, index)
        whole = slice(0, len(labels_B))
        mix_6B = session.mixing.draw(epoch, index, len(labels_B), whole, (32, 32))
        wanted, mixed_with = session.mixing(mix_6B, images, labels_B)
        parts = found[number * accumulate : (number + 1) * accumulate]
        for got, want in zip(
            (torch.cat(part) for part in zip(*(part[:4] for part in parts), strict=True)),
            (wanted, labels_B, *mixed_with),
            strict=True,
        ):
            assert torch.equal(got, want)
        mixed += not torch.equal(wanted, images)
    assert mixed == 5  # those of the first epoch


def test_accuracy_in_training_counts_the_label_of_the_larger_share() -> None:
    one = mixed_recipe(mix_each=True, **SMALL)
    found = seen(session_of(one))
    (metrics,) = go(session_of(one), epochs=1)
    correct_S = torch.zeros(2)
    for _, labels_B, labels2_B, share2_B, logits_SBC in found:
        counted_B = dominant(labels_B, (labels2_B, share2_B))
        assert not torch.equal(counted_B, labels_B)
        correct_S += (logits_SBC.argmax(2) == counted_B).sum(1)
    assert metrics["student_top1"] == pytest.approx((correct_S / 100).tolist())


def test_the_loss_is_the_mixed_cross_entropy() -> None:
    session = session_of(mixed_recipe(**SMALL, mix_each=True))
    losses = []
    session.learner.method.register_forward_hook(lambda _m, _a, loss: losses.append(loss.total))
    for (_, labels_B, labels2_B, share2_B, logits_SBC), loss in zip(
        seen(session), losses, strict=True
    ):
        one_BC, two_BC = (F.one_hot(y, 10).double() for y in (labels_B, labels2_B))
        soft_BC = one_BC + share2_B[:, None].double() * (two_BC - one_BC)
        wanted = sum(F.cross_entropy(logits_BC.double(), soft_BC) for logits_BC in logits_SBC)
        torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_captured_run_has_the_eager_runs_bits(accumulate: int) -> None:
    """Also beyond the epoch that ends mixing, with the graphs of the epochs before."""
    one = mixed_recipe(mix_epochs=2, **SMALL)
    eager = session_of(one, accumulate=accumulate)
    theirs = go(eager, epochs=3)
    captured = session_of(one, captured=True, accumulate=accumulate)
    assert go(captured, epochs=3) == theirs
    same(captured, eager)


@pytest.mark.parametrize("overfit_batch", [False, True])
def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_bits(overfit_batch: bool) -> None:
    one = mixed_recipe(repeats=3 if not overfit_batch else 1, **SMALL)
    whole = session_of(one, captured=True, overfit_batch=overfit_batch)
    rows = go(whole)
    begun = session_of(one, captured=True, overfit_batch=overfit_batch, max_steps=7)
    go(begun)
    resumed = session_of(one, captured=True, overfit_batch=overfit_batch)
    resumed.load_state(*begun.state())
    assert go(resumed, epochs=2 - begun.epoch) == rows[begun.epoch :]
    same(resumed, whole)


@pytest.mark.parametrize("how", [{"balanced": True}, {"images_per_class": 4}])
def test_a_balanced_run_goes_on_with_the_same_bits(how: dict[str, Any]) -> None:
    one = recipe("baseline/resnet8/digits", **{**SMALL, "students": 1, **how})
    whole, begun = session_of(one), session_of(one, max_steps=7)
    rows = go(whole)
    go(begun)
    resumed = session_of(one)
    resumed.load_state(*begun.state())
    assert go(resumed, epochs=1) == rows[1:]
    same(resumed, whole)


def test_a_repeated_batch_is_mixed_once() -> None:
    session = session_of(mixed_recipe(**SMALL), overfit_batch=True)
    steps = seen(session)
    assert len(steps) == 5
    for images, labels_B, labels2_B, share2_B, _ in steps:
        for got, want in zip((images, labels_B, labels2_B, share2_B), steps[0], strict=False):
            assert torch.equal(got, want)


def test_images_on_disk_are_mixed(tmp_path: Path) -> None:
    one = mixed_recipe(
        "baseline/resnet8/imagefolder",
        epochs=2,
        batch_size=4,
        image_size=16,
        eval_resize=16,
        crop_padding=0,
        resized_crop=True,
    )
    root = write_folder(tmp_path / "pictures")
    prepare(root, quiet=True)
    how = {"device": "cpu", "quiet": True, "precision": "fp32", "engine": "loop", "impl": "torch"}
    session = build(one, RunOptions(data_root=root, loader="torchvision", **how))
    assert isinstance(session.stream, DiskStream)
    steps = seen(session)
    assert len(steps) == 2
    assert session.mixing is not None
    for index, step in enumerate(steps):
        images, labels_B = session.stream.batch(0, index)
        mix_64 = session.mixing.draw(0, index, 4, slice(0, 4), (16, 16))
        wanted, mixed_with = session.mixing(mix_64, images, labels_B)
        for got, want in zip(step, (wanted, labels_B, *mixed_with), strict=False):
            assert torch.equal(got, want)


def test_a_step_outside_of_the_loop_is_mixed_on_request() -> None:
    """As the next step will be: for the page's picture, and to find what isn't finite."""
    session = session_of(mixed_recipe(**SMALL))
    images, counted_B = session.mixed(*session.next_batch())
    mixed_with = session.learner.progress.mixed_with
    assert mixed_with is not None
    session.begin_step(120)
    assert session.learner.progress.mixed_with is None
    first = seen(session)[0]
    assert torch.equal(first[0], images)
    assert torch.equal(dominant(first[1], mixed_with), counted_B)


def test_default_recipes_draw_and_mix_nothing() -> None:
    session = session_of(recipe("baseline/resnet8/digits", **{**SMALL, "students": 1}))
    assert session.mixing is None
    session.begin_epoch()
    for images, *_ in session.batches(lambda: None):
        assert MIXING not in session.blocks[images].tensors
        break
    images, labels_B = session.next_batch()
    assert session.mixed(images, labels_B) == (images, labels_B)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cutmix": -1.0}, "cutmix is -1.0: it must be between 0 and 1000"),
        ({"mixup": float("nan")}, "mixup is nan: it must be between 0 and 1000"),
        ({"mix_prob": 0}, "mix_prob is 0.0, so that no batch is mixed: set it above 0"),
        ({"mix_prob": 1.5}, "mix_prob is 1.5: it must be between 0 and 1"),
        ({"mix_epochs": 5}, "mix_epochs is 5, but there are 4 epochs: choose at most as many"),
        (
            {"mixup": 0, "cutmix": 0, "mix_epochs": 2},
            "mix_epochs is 2, but mixup and cutmix are 0: set one of them above 0, or set",
        ),
        (
            {"mixup": 0, "mix_switch_prob": 0.2},
            "mix_switch_prob is 0.2, but only one of mixup and cutmix is above 0: set both",
        ),
        ({"repeats": 0}, "repeats is 0: it must be at least 1"),
        ({"repeats": 3, "balanced": True}, "repeats is 3, but balanced draws each image anew"),
        ({"repeats": 3, "images_per_class": 2}, "images_per_class is 2, but repeats draws the"),
        ({"balanced": True, "images_per_class": 2}, "images_per_class is 2, but balanced draws"),
        ({"images_per_class": 7}, "images_per_class is 7, but batch_size is 24: choose a divisor"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        mixed_recipe(**{**SMALL, **changes})


def test_classes_are_balanced_once() -> None:
    with pytest.raises(UserError, match="class_weights is 'balanced', but balanced draws all"):
        recipe("baseline/resnet8/digits", class_weights="balanced", balanced=True)


def test_a_method_without_mixed_labels_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = mixed_recipe()
    needs = type(MixedCE.needs)(min_students=1)
    monkeypatch.setattr(MixedCE, "needs", needs)
    with pytest.raises(UserError, match=r"mixup is 0.4, but tests.* takes no mixed labels: set it"):
        mixed_recipe()
    monkeypatch.undo()
    assert mixed_recipe() == one


def test_the_last_epoch_that_mixes_is_scaled() -> None:
    one = mixed_recipe(mix_epochs=20, epochs=40)
    assert one.with_epochs(10).mix_epochs == 5
    assert one.with_epochs(1).mix_epochs == 1
    assert mixed_recipe(epochs=40).with_epochs(10).mix_epochs == 0


def test_more_epochs_continue_what_was_mixed_alike() -> None:
    begun = mixed_recipe(epochs=10, mix_epochs=5, milestones=[], ramp_epochs=0.0)
    for done, allowed in ((5, True), (6, False)):
        facts = {"recipe": begun.to_json(), "epoch": done, "batch": 0}
        assert continues(begun.with_epochs(20), facts) == allowed
