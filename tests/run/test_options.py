"""Options of the step: a resumed run keeps them; unavailable ones raise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions

QUICK: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop"}


def small(**changes: object) -> Recipe:
    name = str(changes.pop("name", "okddip-branch/resnet8/digits"))
    return recipe(name, epochs=2, **{"students": 2, "batch_size": 50, **changes})


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "half"
    options = {**QUICK, "engine": "grouped", "accumulate": 2, "clip_norm": 5.0}
    return fastokd.train(small(), out=out, max_steps=2, **options)


def test_a_resumed_run_is_run_as_it_was_begun(halfway: Run, tmp_path: Path) -> None:
    shutil.copytree(halfway.folder, tmp_path / "run")
    fastokd.train(small(), out=tmp_path / "run", resume=True, max_steps=3, quiet=True)
    facts = newest_checkpoint(tmp_path / "run" / "checkpoints")[2]
    begun = {
        "device": "cpu",
        "precision": "fp32",
        "engine": "grouped",
        "compile": False,
        "memory_format": "channels_last",
        "capture": False,
        "streams": False,
        "impl": "auto",
        "apex": False,
        "accumulate": 2,
        "clip_norm": 5.0,
        "overfit_batch": False,
    }
    assert begun.items() <= facts["how"].items()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "bf16"}, r"--precision \(fp32 there, bf16 here\)"),
        ({"engine": "loop"}, r"--engine \(grouped there, loop here\)"),
        ({"accumulate": 4}, r"--accumulate \(2 there, 4 here\)"),
        ({"compile": True}, r"--compile \(False there, True here\)"),
    ],
)
def test_a_resumed_run_is_not_changed(halfway: Run, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fastokd.train(small(), out=halfway.folder, resume=True, quiet=True, **asked)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    whole = fastokd.train(small(), out=tmp_path / "whole", max_steps=2, **QUICK)
    fastokd.train(small(), out=tmp_path / "killed", max_steps=2, **QUICK)
    for checkpoint in (tmp_path / "killed" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    # An epoch's line is written before its checkpoint, the student after the last one.
    with pytest.raises(UserError, match="holds a student and no checkpoint"):
        fastokd.train(small(), out=tmp_path / "killed", resume=True, **QUICK)
    (tmp_path / "killed" / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"another recipe: it differs in lr"):
        fastokd.train(small(lr=0.3), out=tmp_path / "killed", resume=True, **QUICK)
    run = fastokd.train(small(), out=tmp_path / "killed", resume=True, max_steps=2, quiet=True)
    ours, theirs = (newest_checkpoint(r.folder / "checkpoints")[1] for r in (run, whole))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert len(run.metrics) == len(whole.metrics)


def test_a_last_batch_of_one_is_left_out_where_a_norm_needs_two() -> None:
    """ONE's gate normalises over the batch; 500 images make batches of 499 and one."""
    session = build(small(name="one/resnet8/digits", batch_size=99), RunOptions(**QUICK))
    assert len(session.stream) == 1
    other = build(small(batch_size=99), RunOptions(**QUICK))
    assert len(other.stream) == 2
    with pytest.raises(UserError, match=r"batch_size is 1, but one normalises over .* at least 2"):
        build(small(name="one/resnet8/digits", batch_size=1), RunOptions(**QUICK))


def test_no_draw_repeats_an_initial_weights_generator() -> None:
    session = build(
        small(name="okddip_random-branch/resnet8/digits", students=3), RunOptions(**QUICK)
    )
    session.begin_step(1)
    draws = session.learner.progress.draws["belief_BPP"].flatten()
    torch.manual_seed(session.recipe.seed * 1_000_003)
    assert not torch.equal(draws, 1 - torch.rand(draws.shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": True}, "only a GPU has graphs"),
        ({"precision": "tf32"}, "only GPUs have"),
        ({"engine": "fast"}, "engine is 'fast': choose auto, loop, grouped, vmap"),
        ({"memory_format": "nchw"}, "choose auto, channels_last, contiguous"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(small(), RunOptions(**{**QUICK, **options}))


def test_a_string_is_as_good_as_a_path() -> None:
    options = RunOptions(out="runs/a", data_root="data", teacher="t.safetensors")  # type: ignore[arg-type]
    assert (options.out, options.data_root) == (Path("runs/a"), Path("data"))
    assert options.teacher == ("t.safetensors",)
