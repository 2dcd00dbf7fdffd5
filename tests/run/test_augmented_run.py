"""Runs with every operation of augmentation: captured, stopped and resumed, in memory and from disk."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.data import Augment, DiskStream, Split, stream_of
from fastokd.data.augment import operate
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import write_photographs
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator, evaluation_stream
from fastokd.metrics import Meter
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.images import augment_of
from fastokd.run.session import BATCH, Session
from fastokd.run.trial import job
from tests.data.test_disk import SMALL, split_of
from tests.run.test_one_replay import go, loop_of, same

ALL: dict[str, Any] = {
    "auto_augment": "trivialaugment",
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "vertical_flip": True,
    "random_erasing": 0.5,
    "cutout": 8,
}
SIZE = {"epochs": 6, "batch_size": 24}
DIGITS = recipe("baseline/resnet8/digits", **SIZE, **ALL)
CPU = torch.device("cpu")


def photographs(root: Path) -> Recipe:
    """Augmented pictures on disk."""
    write_photographs(root, classes=2, train=10, val=2, size=(60, 50))
    prepare(root, quiet=True)
    on_disk = {"resized_crop": True, "crop_padding": 0, "crop_scale": (0.4, 0.9)}
    return recipe(
        "baseline/resnet8/imagefolder", epochs=6, batch_size=6, image_size=32, **on_disk, **ALL
    )


def session_of(one: Recipe, *, captured: bool, **options: Any) -> Session:
    return loop_of(one, CPU, captured=captured, loader="torchvision", workers=1, **options)


def test_a_captured_and_resumed_run_has_the_eager_runs_bits() -> None:
    eager = session_of(DIGITS, captured=False)
    rows = go(eager)
    captured = session_of(DIGITS, captured=True, max_steps=7)
    go(captured)
    assert (captured.epoch, captured.batch) == (1, 2)
    resumed = session_of(DIGITS, captured=True)
    resumed.load_state(*captured.state())
    assert go(resumed, epochs=1) == rows[1:]
    same(resumed, eager)


def test_so_has_a_run_of_images_on_disk(tmp_path: Path) -> None:
    one = photographs(tmp_path)
    eager = session_of(one, captured=False, data_root=tmp_path)
    assert isinstance(eager.stream, DiskStream)
    go(eager)
    captured = session_of(one, captured=True, data_root=tmp_path, max_steps=5)
    go(captured)
    assert (captured.epoch, captured.batch) == (1, 1)
    resumed = session_of(one, captured=True, data_root=tmp_path)
    resumed.load_state(*captured.state())
    go(resumed, epochs=1)
    same(resumed, eager)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_step_trains_on_the_augmented_images(on_disk: bool, tmp_path: Path) -> None:
    """Which are those of the batch alone, as a user sees them; another epoch has others."""
    one = photographs(tmp_path) if on_disk else DIGITS
    session = session_of(one, captured=False, data_root=tmp_path)
    seen: list[Tensor] = []
    session.learner.cohort.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    go(session)
    stream = session.stream
    assert len(seen) == 2 * len(stream)
    shown = [images for epoch in (0, 1) for images, _ in stream.batches(epoch)]
    assert all(torch.equal(a, b) for a, b in zip(seen, shown, strict=True))
    plain = session_of(
        replace(one, **{name: getattr(Augment(), name) for name in ALL}),
        captured=False,
        data_root=tmp_path,
    )
    # Order, crops and flips are those of a run without the operations.
    for (images, labels), (before, same_labels) in zip(
        stream.batches(0), plain.stream.batches(0), strict=True
    ):
        assert torch.equal(labels, same_labels)
        changed = (images != before).any(-1).float().mean((1, 2))
        assert changed.mean() > 0.4
    assert not torch.equal(shown[0], shown[len(stream)])


def test_ranks_share_the_operations_of_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    images_NHWC = torch.randint(256, (24, 8, 8, 3), dtype=torch.uint8, generator=generator)
    split = Split(images_NHWC, torch.arange(24))
    options: dict[str, Any] = {"augment": Augment(2, **ALL), "shuffle": True, "seed": 5}
    whole, labels_B = stream_of(split, 12, **options).batch(1, 1)
    shares = [stream_of(split, 12, **options, rank=r, world_size=3).batch(1, 1) for r in range(3)]
    assert torch.equal(torch.cat([images for images, _ in shares]), whole)
    assert torch.equal(torch.cat([labels for _, labels in shares]), labels_B)


def test_every_loader_gives_a_batch_its_operations(tmp_path: Path) -> None:
    write_photographs(tmp_path, classes=2, train=10, val=2, size=(60, 50))
    prepare(tmp_path, quiet=True)
    augment = Augment(0, resized_crop=True, crop_scale=(0.4, 0.5), crop_ratio=(2.0, 2.0), **ALL)
    for loader in ("torchvision", "nvjpeg"):
        split = split_of(tmp_path, loader, view=SMALL)
        stream = stream_of(split, 5, augment=augment, shuffle=True, seed=2)
        assert isinstance(stream, DiskStream)
        whole = list(stream.batches(3))
        for index, (images, labels) in enumerate(stream.decoded(3)):
            rows_BL = stream.operations(3, index)
            assert rows_BL is not None
            assert torch.equal(operate(augment, images, rows_BL), whole[index][0])
            assert torch.equal(labels, whole[index][1])
        assert torch.equal(stream.batch(3, 1)[0], whole[1][0])
        ((later, _),) = itertools.islice(stream.batches(3, start_batch=2), 1)
        assert torch.equal(later, whole[2][0])
        box_B4 = stream.draws(0, 0).box_B4
        assert box_B4 is not None
        area_B = box_B4[:, 2:].prod(1) / split.sizes_N2[stream.draws(0, 0).index_B].prod(1)
        assert ((area_B > 0.37) & (area_B < 0.53)).all()
        assert (box_B4[:, 3] > 1.8 * box_B4[:, 2]).all()


def test_a_repeated_batch_is_augmented_once() -> None:
    session = session_of(DIGITS, captured=False, overfit_batch=True)
    seen: list[Tensor] = []
    session.learner.cohort.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    go(session, epochs=1)
    assert all(torch.equal(images, seen[0]) for images in seen)
    plain, _ = session_of(replace(DIGITS, auto_augment="none"), captured=False).next_batch()
    assert not torch.equal(seen[0], plain)


def test_recipes_without_operations_draw_nothing_more() -> None:
    plain = session_of(recipe("baseline/resnet8/digits", **SIZE), captured=False)
    assert [set(draws) for draws in plain._ahead(24)] == [{BATCH}] * 4


def test_the_mean_fills_and_a_timed_trial_takes_the_recipe(tmp_path: Path) -> None:
    assert augment_of(DIGITS, (0.5, 0.25, 1.0)).fill == (128, 64, 255)
    session = session_of(photographs(tmp_path), captured=False, data_root=tmp_path)
    asked = Recipe.from_json(job(session, session.learner.choice)["recipe"])
    assert (asked.resized_crop, asked.crop_scale) == (False, (0.08, 1.0))
    assert asked.auto_augment == "trivialaugment"


def test_flipped_evaluation_is_the_mean_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the students and of the running average."""
    one = recipe("baseline/resnet8/digits", **SIZE, flip=True, test_flip=True, ema=0.5)
    session = session_of(one, captured=False)
    counted: list[Tensor] = []
    update = Meter.update

    def watched(meter: Meter, logits_SBC: Tensor, *rest: Any) -> None:
        counted.append(logits_SBC)
        update(meter, logits_SBC, *rest)

    monkeypatch.setattr(Meter, "update", watched)
    Evaluator(session)()
    cohort, expected, plain = session.learner.cohort.eval(), [], []
    assert session.data.val is not None
    streams = [evaluation_stream(split) for split in (session.data.val, session.data.test)]
    with torch.no_grad():
        for images_BHWC, _ in itertools.chain.from_iterable(one.batches(0) for one in streams):
            both = [cohort(images).logits_SBC for images in (images_BHWC, images_BHWC.flip(2))]
            expected.append(torch.stack(both).mean(0))
            plain.append(both[0])
    # The average still has the weights that it was begun with.
    torch.testing.assert_close(torch.cat(counted, 1), torch.cat(2 * expected, 1))
    counted.clear()
    session.recipe = replace(one, test_flip=False)
    Evaluator(session)()
    assert torch.equal(torch.cat(counted, 1), torch.cat(2 * plain, 1))
    assert not torch.allclose(torch.cat(plain, 1), torch.cat(expected, 1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"crop_scale": (0.5, 1.0)},
            "resized_crop is false: set resized_crop to true, or set crop_scale to .0.08, 1.0.",
        ),
        ({"crop_ratio": (1.0, 1.0)}, "crop_ratio is .1.0, 1.0., but resized_crop is false"),
        ({"crop_scale": (0.9, 0.1)}, "a smallest and a largest fraction"),
        ({"crop_scale": (0.5,)}, "a smallest and a largest fraction"),
        ({"crop_ratio": (0.0, 1.0)}, "a smallest and a largest ratio"),
        (
            {"auto_augment": "autoaugment"},
            "auto_augment is 'autoaugment': choose none, randaugment",
        ),
        (
            {"randaugment_ops": 3},
            "is none: set auto_augment to randaugment or timm_randaugment, or",
        ),
        ({"randaugment_std": 1, "auto_augment": "randaugment"}, "set auto_augment to timm_randaug"),
        ({"randaugment_magnitude": 21, "auto_augment": "timm_randaugment"}, "takes at most 10"),
        ({"randaugment_magnitude": 12, "auto_augment": "cifar10"}, "auto_augment is cifar10: set"),
        ({"randaugment_magnitude": 31, "auto_augment": "randaugment"}, "between 0 and 30"),
        ({"randaugment_ops": 0, "auto_augment": "randaugment"}, "must be at least 1"),
        ({"color_jitter": (0.4, 0.4, 0.4)}, "four numbers, for brightness, contrast"),
        ({"color_jitter": (0.0, 0.0, 0.0, 0.6)}, "the last at most 0.5"),
        ({"color_jitter": (-0.1, 0.0, 0.0, 0.0)}, "at least 0"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5: it must be between 0 and 1"),
        ({"erasing_scale": (0.1, 0.2)}, "random_erasing is 0: set it to a probability"),
        ({"cutout": -1}, "must be at least 0"),
        ({"cutout": 40}, "cutout is 40: it must be at most the training images' size, 32"),
        ({"test_flip": True}, "flip is false, so the students have seen no mirrored image"),
    ],
)
def test_what_can_be_got_wrong(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe("baseline/resnet8/digits", **changes)
