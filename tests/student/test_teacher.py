"""A teacher is taken from whatever holds a student, and checked against the data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastokd.checkpoint import save_checkpoint
from fastokd.data import DatasetSplits, load_dataset, read_all
from fastokd.errors import UserError
from fastokd.evaluate import evaluate
from fastokd.models import create_model
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.student import teacher
from fastokd.student.file import read_weights
from fastokd.student.teacher import build_teacher, find_teachers
from fastokd.student.weights import student_facts
from fastokd.train import train
from tests.data.make import write_cifar

KD = "kd/resnet8/digits"
SHORT = RunOptions(max_steps=2, quiet=True, engine="loop", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def digits() -> DatasetSplits:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A branch cohort, whose leader is the teacher."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    return train(recipe("okddip-branch@2/resnet8/digits"), SHORT, out=out)


def test_it_comes_from_a_run_a_checkpoint_or_a_file(trained: Run, digits: DatasetSplits) -> None:
    checkpoint = next((trained.folder / "checkpoints").glob("last-*"))
    images = torch.randn(2, 3, 32, 32)
    logits = []
    for path in (trained.folder, trained.folder / "student.safetensors", checkpoint):
        network = build_teacher(read_weights(path), digits).eval()
        logits.append(network(images))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    (trained.folder / "student.safetensors").rename(trained.folder / "away")
    try:
        assert read_weights(trained.folder).path == checkpoint
    finally:
        (trained.folder / "away").rename(trained.folder / "student.safetensors")


def test_a_run_learns_from_it_keeps_it_and_resumes_with_it(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(SHORT, teacher=trained.folder)
    run = train(recipe(KD), options, out=tmp_path / "kd")
    kd = run.last["train"]["kd_S"][0]
    assert kd > 0
    kept = load_file(tmp_path / "kd" / "teacher.safetensors")
    for key, value in load_file(trained.folder / "student.safetensors").items():
        assert torch.equal(kept[key], value)
    monkeypatch.chdir(tmp_path)  # no default teacher here, and none is named
    again = train(recipe(KD), SHORT, out=tmp_path / "kd", resume=True, max_steps=4)
    assert again.last["step"] == 4
    assert evaluate(tmp_path / "kd")["test"]["mean_top1"] >= 0


def test_a_missing_one_is_answered_with_what_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`fastokd train baseline/resnet110/cifar100`"):
        find_teachers(recipe("kd/resnet32/cifar100"), (), None)
    with pytest.raises(UserError, match="there is none at elsewhere"):
        find_teachers(recipe("okddip_kd-branch/resnet32/cifar100"), ("elsewhere",), None)
    with pytest.raises(UserError, match="needs a trained teacher"):
        train(recipe(KD), SHORT, out=tmp_path / "kd")
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_found(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/baseline-resnet110-digits-seed0").symlink_to(trained.folder)
    assert find_teachers(recipe(KD), (), None)[0].facts["model"] == "resnet8"


def test_the_default_folder_is_where_its_recipe_trains() -> None:
    r = recipe("kd/resnet32/cifar100")
    default = teacher.default_path(r)
    from fastokd.run.facts import run_path

    assert run_path(recipe(r.teacher), RunOptions()) == default


def test_the_command_that_trains_it_holds_out_what_its_student_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = recipe("kd/resnet32/cifar100", val=5000, seed=3)
    assert teacher.teacher_recipe(student) == recipe("baseline/resnet110/cifar100", val=5000)
    with pytest.raises(UserError, match=r"`fastokd train baseline/resnet110/cifar100 --val 5000`"):
        find_teachers(student, (), None)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar"), "cifar10").parent


def cifar_student(path: Path, root: Path, **facts: str | None) -> Path:
    """An untrained student of CIFAR-10, of which 20 images were held out unless ``facts`` say else."""
    data = load_dataset("cifar10", root)
    one = recipe("baseline/resnet8/cifar10", val=20)
    said = student_facts(one, data.class_names, data.preprocessing, 0) | facts
    kept = {name: value for name, value in said.items() if value is not None}
    save_file(create_model("resnet8", 10).state_dict(), path, metadata=kept)
    return path


def test_the_held_out_images_are_the_same_for_every_seed(cifar: Path) -> None:
    options = RunOptions(data_root=cifar, device="cpu", engine="loop")
    of = recipe("baseline/resnet8/cifar10", val=20, batch_size=20)
    splits = [build(dataclasses.replace(of, seed=s), options).data for s in (0, 5)]
    alone = load_dataset("cifar10", cifar, val=20)
    for data in splits:
        assert data.val is not None
        assert alone.val is not None
        assert torch.equal(read_all(data.val)[0], read_all(alone.val)[0])
        assert torch.equal(read_all(data.train)[0], read_all(alone.train)[0])
        assert data.held_out == {"val": 20}


@pytest.mark.parametrize("way", ["teacher", "init"])
@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, ""),
        (
            {"val": "0"},
            r"was trained on images that --val 20 holds out, .* held out none: .*--val 20",
        ),
        ({"val": "10"}, r"was trained on images that --val 20 holds out, .* held out 10"),
        ({"val": None}, "it may have seen the images of --val 20"),
        ({"val": "0", "dataset": '"imagefolder"'}, ""),
    ],
)
def test_weights_that_have_seen_the_held_out_images_are_refused(
    way: str,
    facts: dict[str, str | None],
    says: str,
    cifar: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = cifar_student(tmp_path / "given.safetensors", cifar, **facts)
    name = "kd" if way == "teacher" else "baseline"
    of = recipe(f"{name}/resnet8/cifar10", val=20, batch_size=20)
    value: Any = path if way == "teacher" else (str(path),)
    options = RunOptions(data_root=cifar, device="cpu", engine="loop", **{way: value})
    unknown = facts.get("val", "") is None
    if says and not unknown:
        with pytest.raises(UserError, match=says if way == "teacher" else says.split(": ")[0]):
            build(of, options)
        build(dataclasses.replace(of, val=0), options)
        return
    build(of, options)
    # Of weights to begin from it is usual that they say nothing: those of another library.
    assert capsys.readouterr().err.count("warning") == (unknown and way == "teacher")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_names": json.dumps(["a", "b"])}, "with 2 classes, lacks 10 of digits's 10"),
        ({"class_names": json.dumps(list("01234567ab"))}, r"lacks 2 of digits's 10 \(8, 9\)"),
        ({"class_names": json.dumps(["0_1", "0 1", *"23456789"])}, "lacks 2 of digits's 10"),
        ({"class_names": json.dumps(list("0012345678"))}, "lacks 1 of digits's 10"),
        (
            {"class_names": json.dumps(list("01234567899")), "model": "resnet8"},
            "may be '9' and '9'",
        ),
        ({"class_names": None, "num_classes": "9"}, "has 9 classes without names"),
        ({"levels": "256"}, "whose levels is 256"),
        ({"std": json.dumps([0.1, 0.1])}, "its std is"),
        ({"model": "resnet14"}, "is no resnet14"),
        ({"model": "resnet9"}, "unknown model"),
        ({"mean": None}, "doesn't say its mean"),
        ({"mean": "[0.1,"}, "its mean can't be read"),
        ({"mean": "[" * 100_000}, "its mean can't be read"),
        ({"model": None}, "doesn't say its model"),
    ],
)
def test_one_that_does_not_fit_is_refused(
    changes: dict[str, Any], says: str, digits: DatasetSplits, trained: Run, tmp_path: Path
) -> None:
    state = load_file(trained.folder / "student.safetensors")
    facts = {**read_weights(trained.folder, student=1).facts, **changes}
    facts = {name: value for name, value in facts.items() if value is not None}
    save_file(state, tmp_path / "t.safetensors", metadata=facts)
    with pytest.raises(UserError, match=says):
        build_teacher(read_weights(tmp_path / "t.safetensors"), digits)


def test_what_holds_no_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.pth").write_bytes(b"rot")
    with pytest.raises(UserError, match="fastokd convert"):
        read_weights(tmp_path / "t.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run, checkpoint or student"):
        read_weights(tmp_path / "empty")
    save_checkpoint(tmp_path / "last-1", {}, {"recipe": {"nonsense": 1}})
    with pytest.raises(UserError, match="no recipe of this version"):
        read_weights(tmp_path / "last-1")


def test_general_kdcl_needs_held_out_images(tmp_path: Path) -> None:
    r = recipe("kdcl/resnet8/digits", method_options={"target": "general"})
    run = train(r, SHORT, out=tmp_path / "run", max_steps=8)
    state = load_file(next((tmp_path / "run/checkpoints").glob("last-*")) / "state.safetensors")
    weights_S = state["method.weights_S"]
    assert weights_S.sum() == pytest.approx(1.0, abs=1e-5)
    assert not torch.allclose(weights_S, torch.full((4,), 0.25))
    assert run.last["train"]["kd_S"][0] > 0
