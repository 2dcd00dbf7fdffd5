"""TensorBoard and the picture of a batch are of what the run does."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.folder import Run
from fastokd.run.hooks import Hook, Hooks
from fastokd.run.loggers import scalars
from fastokd.run.options import RunOptions
from fastokd.train import train

SMALL = dataclasses.replace(recipe("okddip-branch@3/resnet8/digits", epochs=2), batch_size=50)
OPTIONS = RunOptions(quiet=True, engine="loop", precision="fp32", device="cpu")


def test_tensorboard_says_what_metrics_say(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(SMALL, OPTIONS, out=out, tensorboard=True, max_steps=3)
    # What the half epoch had said is replaced when it is whole.
    train(SMALL, OPTIONS, out=out, tensorboard=True, resume=True)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for row in Run.load(out).metrics:
        for name, value in scalars(row):
            told = {event.step: event.value for event in events.Scalars(name)}
            assert set(told) <= {row["step"] for row in Run.load(out).metrics}
            assert told[row["step"]] == pytest.approx(value, rel=1e-6), name
    assert "test/leader_top1" in events.Tags()["scalars"]
    assert "train/kd_S/0" in events.Tags()["scalars"]


def test_who_began_last_is_closed_first(capsys: pytest.CaptureFixture[str]) -> None:
    """And one that fails keeps nobody from being closed."""
    closed = []

    class Closing(Hook):
        def __init__(self, title: str) -> None:
            self.title = title

        def on_end(self) -> None:
            closed.append(self.title)
            if self.title == "b":
                raise OSError("full")

    with Hooks() as hooks:
        hooks.add(*map(Closing, "abc"))
    assert closed == ["c", "b", "a"]
    assert capsys.readouterr().err == "warning: the run continues without b: OSError: full\n"


def test_a_package_that_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(UserError, match="pip install wandb"):
        train(SMALL, OPTIONS, out=tmp_path / "run", wandb=True)
    assert not list(tmp_path.iterdir())


def test_the_picture_is_the_first_batch(tmp_path: Path) -> None:
    train(SMALL, OPTIONS, out=tmp_path / "run", show_augmentation=True, max_steps=1)
    picture = np.asarray(Image.open(tmp_path / "run/augmentation.png"))
    session = build(SMALL, OPTIONS)
    images, _ = session.stream.batch(0, 0)
    # Two pixels between the images: the second of the second row.
    tile = picture[36:68, 36:68]
    assert np.abs(tile.astype(int) - images[9].numpy()).max() <= 1
