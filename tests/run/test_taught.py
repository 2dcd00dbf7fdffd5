"""Runs with foreign and with several teachers, with cached logits, and with a model's own normalisation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.data import load_dataset
from fastokd.errors import UserError
from fastokd.learner.learner import TAUGHT
from fastokd.models import create_model
from fastokd.models.pretrained import published
from fastokd.ops.normalize import scale_and_shift
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.taught import key_of
from fastokd.student.teacher_file import read_teacher
from fastokd.student.weights import Weights, student_facts

TIMM = "timm:test_resnet.r160_in1k"
QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}
# An epoch is two steps. The images of a batch aren't augmented.
PLAIN = {"epochs": 1, "batch_size": 50, "milestones": [1], "crop_padding": 0}


def small(name: str = "kd/resnet8/digits", **changes: Any) -> Recipe:
    return recipe(name, **{**PLAIN, **changes})


@pytest.fixture
def teachers(tmp_path: Path) -> list[str]:
    """Two untrained students, of which the second is translated."""
    data = load_dataset("digits")
    torch.manual_seed(1)
    (tmp_path / "sources").mkdir()
    paths = []
    for name, mean in (("a", data.mean), ("b", (0.5, 0.4, 0.3))):
        shown = dataclasses.replace(data.preprocessing, mean=mean)
        facts = student_facts(recipe("baseline/resnet8/digits"), data.class_names, shown, 0)
        path = tmp_path / "sources" / f"{name}.safetensors"
        path.write_bytes(Weights(path, create_model("resnet8", 10).state_dict(), facts).to_bytes())
        paths.append(str(path))
    return paths


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(run / "checkpoints")[1]


def assert_same(ours: Path, theirs: Path) -> None:
    mine, other = state_of(ours), state_of(theirs)
    assert mine.keys() == other.keys()
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


@pytest.mark.parametrize("cached", ["no", "plain"])
def test_a_killed_run_continues_with_its_copies(
    cached: str, teachers: list[str], tmp_path: Path
) -> None:
    of = small(cache_teacher=cached, crop_padding=2)
    whole = fastokd.train(of, out=tmp_path / "whole", teacher=teachers, **QUICK)
    assert whole.last["train"]["kd_S"][0] > 0
    cut = tmp_path / "cut"
    fastokd.train(of, out=cut, teacher="+".join(teachers), max_steps=1, **QUICK)
    shutil.rmtree(tmp_path / "sources")
    fastokd.train(of, out=cut, resume=True, **QUICK)
    assert_same(cut, whole.folder)
    assert (cut / "teacher_logits.safetensors").is_file() == (cached == "plain")
    with pytest.raises(UserError, match=r"differs in --teacher .*a.safetensors"):
        fastokd.train(of, out=cut, resume=True, teacher="other", **QUICK)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cached_logits_are_those_of_each_step(accumulate: int, teachers: list[str]) -> None:
    options = RunOptions(teacher=(teachers[1],), accumulate=accumulate, **QUICK)
    found = []
    for cached in ("no", "exact"):
        session = build(small(cache_teacher=cached), options)
        session.learner.train()
        for images, *batch in session.batches(lambda: None):
            _, loss = session.whole_step(session.learner, images, *batch)
            found.append(float(loss.parts["kd_S"][0]))
            session.finish_step()
    assert found[:2] == pytest.approx(found[2:], rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_a_damaged_or_foreign_file_of_logits_is_computed_again(
    teachers: list[str], tmp_path: Path
) -> None:
    of, out = small(cache_teacher="exact"), tmp_path / "run"
    fastokd.train(of, out=out, teacher=teachers[0], max_steps=1, **QUICK)
    file = out / "teacher_logits.safetensors"
    options = RunOptions(out=out, resume=True, **QUICK)
    written = build(of, options).taught_NC
    assert written is not None
    for content in (
        b"",
        file.read_bytes()[:-4],
        file.read_bytes().replace(b'{"of":"', b'{"of":"0'),
    ):
        file.write_bytes(content)
        again = build(of, options).taught_NC
        assert again is not None
        assert torch.equal(again, written)


def test_logits_of_other_classes_or_preprocessing_are_not_reused(teachers: list[str]) -> None:
    data = load_dataset("digits")
    weights = [read_teacher(teachers[0])]
    shown = dataclasses.replace(data.preprocessing, mean=(0.5, 0.4, 0.3))
    others: tuple[dict[str, Any], ...] = (
        {},
        {"class_names": data.class_names[::-1]},
        {"preprocessing": shown},
    )
    assert len({key_of(weights, dataclasses.replace(data, **one)) for one in others}) == 3


def test_a_step_outside_of_the_loop_has_the_logits_of_its_batch(teachers: list[str]) -> None:
    options = RunOptions(teacher=(teachers[0],), **QUICK)
    session = build(small(cache_teacher="plain", crop_padding=2), options)
    session.batch = 1
    session.begin_step(50)
    rows_NC = session.taught_NC
    assert rows_NC is not None
    index_B = session.stream.order.samples(0, 1)  # type: ignore[attr-defined]
    assert torch.equal(session.learner.progress.draws[TAUGHT], rows_NC[index_B])
    _, labels_B = session.next_batch()
    assert torch.equal(session.data.train.labels_N[index_B], labels_B)  # type: ignore[union-attr]
    assert session.learner.cohort.teacher is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: small(cache_teacher="exact", crop_padding=1), "but crop_padding is 1"),
        (lambda: small(cache_teacher="exact", flip=True), "but flip is True"),
        (lambda: small("baseline/resnet8/digits", cache_teacher="plain"), "has no teacher"),
        (lambda: small(normalise_by="model"), "resnet8 is no network of torchvision or timm"),
        (lambda: small(cache_teacher="always"), "cache_teacher"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    make: Callable[[], Recipe], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_one_repeated_batch_has_no_cached_logits(teachers: list[str]) -> None:
    options = RunOptions(teacher=(teachers[0],), overfit_batch=True, **QUICK)
    with pytest.raises(UserError, match="but --overfit-batch repeats one augmented batch"):
        build(small(cache_teacher="exact"), options)


def test_a_pretrained_student_is_normalised_as_its_weights_were(tmp_path: Path) -> None:
    stated, out = published(TIMM), tmp_path / "run"
    of = small(f"baseline/{TIMM}/digits", normalise_by="model", batch_size=20)
    fastokd.train(of, out=out, max_steps=1, **QUICK)
    fastokd.train(of, out=out, max_steps=2, resume=True, **QUICK)
    session = build(of, RunOptions(out=out, **QUICK), training=False)
    assert torch.equal(session.learner.cohort.scale_C, scale_and_shift(stated.mean, stated.std)[0])
    weights = fastokd.student.file.read_weights(out)
    assert json.loads(weights.facts["mean"]) == list(stated.mean)
    assert dataclasses.replace(of, normalise_by="data") != of
    with pytest.raises(UserError, match=r"timm:test_resnet.* and torchvision:alexnet were trained"):
        build(
            small(f"dml/{TIMM}+torchvision:alexnet/digits", normalise_by="model"),
            RunOptions(**QUICK),
        )
