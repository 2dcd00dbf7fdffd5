"""From a folder of photographs to a trained leader: prepare, train, resume, evaluate, by either
loader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

import fastokd
from fastokd import cli
from fastokd.checkpoint import newest_checkpoint
from fastokd.data import load_dataset
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import write_photographs
from fastokd.errors import DataFileError, UserError
from fastokd.measured import cost
from fastokd.measured.answering import PICTURED
from fastokd.models import create_model
from fastokd.recipe.names import Recipe, list_recipes, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.seeds import keyed_generator
from tests.data.loaders import LOADERS, needs_dali

QUICK = {"quiet": True, "precision": "fp32", "engine": "loop", "workers": 2}


def tiny(epochs: int = 3, model: str = "resnet8", **changes: object) -> Recipe:
    """ImageNet's recipe with a student and images that a test can wait for."""
    sizes = {"students": 3, "batch_size": 12, "image_size": 32, "eval_resize": 37, "lr": 0.02}
    name = f"okddip-branch/{model}/imagenet"
    return recipe(name, epochs=epochs, **{**sizes, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 48 images to train and 10 to be tested on; one more is damaged."""
    root = tmp_path_factory.mktemp("imagenet")
    write_photographs(root, classes=2, train=24, val=5, size=(80, 60))
    (root / "train" / "n00000000" / "zero.JPEG").write_bytes(b"")
    prepare(root, quiet=True)
    return root


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_learns_resumes_and_is_evaluated(
    root: Path,
    tmp_path: Path,
    loader: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "PATIENCE", 0.0)  # one step is timed
    options = {**QUICK, "data_root": root, "loader": loader}
    whole = fastokd.train(tiny(), out=tmp_path / "whole", **{**options, "quiet": False})
    printed = capsys.readouterr().out
    assert all(0 < row["data_seconds"] < row["seconds"] for row in whole.metrics)
    answers = whole.answers()
    assert answers.accuracy(answers.kept) == whole.last["test"]["leader_top1"]
    assert [*answers.pictures()] == answers.mistakes(answers.kept, PICTURED)
    assert whole.cost().seconds["data"] > 0
    assert f"images are decoded by {loader}" in printed
    assert "1 of 59 files are quarantined and not read (the first: train/n0" in printed
    losses = [row["train"]["loss"] for row in whole.metrics]
    assert losses[2] < losses[0]
    told = json.loads((whole.folder / "environment.json").read_text())
    assert told["loader"] == loader

    # Stopped within the second epoch, where the loaders have decoded ahead.
    out = tmp_path / "resumed"
    fastokd.train(tiny(), out=out, max_steps=6, **options)
    fastokd.train(tiny(), out=out, resume=True, **QUICK, data_root=root)
    ours, theirs = (newest_checkpoint(run / "checkpoints")[1] for run in (out, whole.folder))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name

    scores = fastokd.evaluate(out, options=RunOptions(**options))
    assert scores["test"] == whole.last["test"]


@needs_dali
@pytest.mark.proof
def test_both_loaders_score_a_student_alike(tmp_path: Path) -> None:
    """Top-1 within 0.1%: at most one of a thousand images."""
    write_photographs(tmp_path / "data", classes=10, train=30, val=100, size=(80, 60))
    prepare(tmp_path / "data", quiet=True)
    options = {**QUICK, "data_root": tmp_path / "data"}
    run = fastokd.train(tiny(2, lr=0.005), out=tmp_path / "run", loader="dali", **options)
    scores = {
        loader: fastokd.evaluate(run.folder, options=RunOptions(**options, loader=loader))["test"]
        for loader in ("dali", "torchvision")
    }
    dali, torchvision = (scores[loader]["leader_top1"] for loader in ("dali", "torchvision"))
    assert 0.4 < dali < 1.0
    assert abs(dali - torchvision) < 0.001 + 1e-9
    print(f"leader's top-1 by DALI {dali:.4f}, by torchvision {torchvision:.4f}")


def test_a_file_that_vanishes_stops_the_run_after_a_checkpoint(root: Path, tmp_path: Path) -> None:
    """Put back, the run goes on to the same bits as one that never stopped."""
    options = {**QUICK, "data_root": root}
    whole = fastokd.train(tiny(1), out=tmp_path / "whole", **options)
    split = load_dataset("imagenet", root, image_size=32, eval_resize=37).train
    order = torch.randperm(48, generator=keyed_generator(0, 0, "order"))
    victim = split.path(int(order[30]))  # type: ignore[union-attr]
    content, facts = victim.read_bytes(), victim.stat()
    out = tmp_path / "stopped"
    fastokd.train(tiny(1), out=out, max_steps=1, **options)
    victim.unlink()
    try:
        with pytest.raises(UserError, match=f"1 file is gone .*{victim.name}"):
            fastokd.train(tiny(1), out=tmp_path / "fresh", **options)
        assert not (tmp_path / "fresh").exists()
        with pytest.raises(DataFileError, match=victim.name):
            fastokd.train(tiny(1), out=out, resume=True, **options)
    finally:
        victim.write_bytes(content)
        os.utime(victim, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert newest_checkpoint(out / "checkpoints")[2]["step"] == 2
    again = fastokd.train(tiny(1), out=out, resume=True, **options)
    ours, theirs = (newest_checkpoint(run.folder / "checkpoints")[1] for run in (again, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_leader_of_a_resnet18_is_torchvisions(root: Path, tmp_path: Path) -> None:
    """Two steps; the file that is kept loads into torchvision and gives the leader's logits."""
    run = fastokd.train(
        tiny(1, "resnet18", students=2, batch_size=24),
        out=tmp_path / "run",
        data_root=root,
        **QUICK,
    )
    theirs = resnet18(num_classes=2).eval()
    theirs.load_state_dict(load_file(run.folder / "student.safetensors"))
    _, tensors, facts, _ = newest_checkpoint(run.folder / "checkpoints")
    session = build(run.recipe, RunOptions(**QUICK, data_root=root), training=False)
    session.load_state(tensors, facts)
    ours = create_model("resnet18", 2).eval()
    ours.load_state_dict(session.learner.cohort.student_state(1))
    x_BCHW = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x_BCHW), theirs(x_BCHW))


def test_the_papers_recipes_are_listed_and_say_what_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name for name in list_recipes() if name.endswith("/imagenet")}
    assert {
        "okddip-branch/resnet34/imagenet",
        "okddip-network/resnet34/imagenet",
        "dml/resnet34/imagenet",
        "cl_ilr/resnet34/imagenet",
        "one/resnet34/imagenet",
        "baseline/resnet34/imagenet",
        "ffsd/resnet18/imagenet",
        "ffsd/resnet34/imagenet",
    } <= names
    arguments = ["train", "baseline/resnet18/imagenet", "--out", str(tmp_path / "run")]
    assert cli.run_command([*arguments, "--data-root", str(tmp_path)]) == 2
    assert "run `fastokd prepare" in capsys.readouterr().err
