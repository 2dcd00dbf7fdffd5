"""``--init``: what students take from trained weights, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.models import create_model
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions
from fastokd.student import init
from fastokd.student.file import read_weights
from fastokd.train import train

NAMES = tuple("abcdefg")
SHORT = RunOptions(max_steps=1, quiet=True, engine="loop", precision="fp32", device="cpu")


def cohort(model: str = "resnet8", students: int = 3, sharing: str = "network") -> Cohort:
    return Cohort((model, students), len(NAMES), sharing=sharing)


def weights(model: str = "resnet8", classes: int = len(NAMES)) -> dict[str, Tensor]:
    """A student's state, every entry unlike a fresh one."""
    generator = torch.Generator().manual_seed(1)
    state = create_model(model, classes).state_dict()
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in state.items()
    }


def begin_from(made: Cohort, paths: list[Path], names: Sequence[str], kept: int) -> list[str]:
    return init.begin_from(made, init.read_files(paths), names, kept)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """The floating-point entries that are equal."""
    return {k for k in ours if ours[k].is_floating_point() and torch.equal(ours[k], theirs[k])}


@pytest.mark.parametrize("sharing", ["network", "branch"])
def test_other_classes_get_a_new_classifier(tmp_path: Path, sharing: str) -> None:
    state = weights(classes=10)
    made = cohort(sharing=sharing)
    fresh = cohort(sharing=sharing)
    notes = begin_from(made, [saved(tmp_path / "w.pth", state)], NAMES, 2)
    assert "new classifier (fc.weight, fc.bias)" in notes[1]
    for s in range(3):
        own = made.student_state(s)
        floats = {key for key in own if own[key].is_floating_point()}
        body = floats - {"fc.weight", "fc.bias"}
        assert {k for k in body if torch.equal(own[k], state[k])} == body
        assert torch.equal(own["fc.weight"], fresh.student_state(s)["fc.weight"])
    assert not torch.equal(made.student_state(0)["fc.weight"], made.student_state(1)["fc.weight"])


@pytest.mark.parametrize("sharing", ["network", "branch"])
def test_of_students_alike_one_has_the_classifier(tmp_path: Path, sharing: str) -> None:
    """Else they would see the same images, and never differ."""
    state = weights()
    made = cohort(sharing=sharing)
    notes = begin_from(made, [saved(tmp_path / "w.pth", state)], NAMES, 2)
    assert "student 2's" in notes[-1]
    for s in range(3):
        held = {"fc.weight", "fc.bias"} <= same(made.student_state(s), state)
        assert held == (s == 2)
        assert "layer3.0.conv1.weight" in same(made.student_state(s), state)
    alone = cohort(students=1)
    begin_from(alone, [tmp_path / "w.pth"], NAMES, 0)
    assert same(alone.student_state(0), state) >= {"fc.weight", "conv1.weight"}


def test_a_file_for_each(tmp_path: Path) -> None:
    made = cohort(students=2)
    states = [weights(), {k: v + 1 for k, v in weights().items()}]
    files = [saved(tmp_path / f"{i}.pth", state) for i, state in enumerate(states)]
    begin_from(made, files, NAMES, 0)
    for s, state in enumerate(states):
        assert {"fc.weight", "conv1.weight"} <= same(made.student_state(s), state)


@pytest.mark.parametrize("place", ["", "state_dict", "model", "weight"])
def test_where_trainers_put_it(tmp_path: Path, place: str) -> None:
    state = {f"module.{key}": value for key, value in weights().items()}
    file = saved(tmp_path / "w.pth", {place: state, "epoch": 3} if place else state)
    made = cohort(students=1)
    begin_from(made, [file], NAMES, 0)
    assert "conv1.weight" in same(made.student_state(0), weights())


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in state.items()}


BESIDE = {"projector.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize(
    ("form", "note"),
    [
        (lambda s: behind("module.", s), ""),
        (lambda s: behind("model.", s), ""),
        (lambda s: behind("_orig_mod.", s), ""),
        (lambda s: behind("module._orig_mod.", s), ""),
        (lambda s: behind("_fsdp_wrapped_module.", s), ""),
        (lambda s: behind("backbone.", s), ""),
        (lambda s: {**behind("backbone.", s), **BESIDE}, "beside the network: projector.weight"),
        (lambda s: {**behind("net.", s), **behind("teacher.", other(s))}, ""),
        (lambda s: {**behind("model.", s), **behind("ema_model.module.", other(s))}, "an average"),
        (lambda s: {**behind("student.", s), **behind("student_ema.", other(s))}, "an average"),
        (lambda s: {**s, **behind("ema_model.module.", other(s))}, "an average"),
        (lambda s: behind("ema_model.module.", s), ""),
    ],
)
def test_the_one_group_that_is_the_network_is_taken(
    form: Any, note: str, suffix: str, tmp_path: Path
) -> None:
    """Whatever stands beside it, and whatever stands before its keys."""
    file = tmp_path / f"w.{suffix}"
    content = form(weights())
    save_file(content, file) if suffix != "pth" else torch.save(content, file)
    made = cohort(students=1)
    notes = begin_from(made, [file], NAMES, 0)
    assert same(made.student_state(0), weights()) >= {"conv1.weight", "fc.weight"}
    assert note in "; ".join(notes)


def test_without_a_classifier_only_where_it_is_all(tmp_path: Path) -> None:
    """Else what stands beside may be the classifier."""
    body = {k: v for k, v in behind("backbone.", weights()).items() if ".fc." not in k}
    made = cohort(students=1)
    begin_from(made, [saved(tmp_path / "body.pth", body)], NAMES, 0)
    assert "conv1.weight" in same(made.student_state(0), weights())
    file = saved(tmp_path / "headed.pth", {**body, "head.fc.weight": weights()["fc.weight"]})
    with pytest.raises(UserError, match=r"extra: backbone\.conv1\.weight"):
        begin_from(made, [file], NAMES, 0)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    """But a count of batches may be of any kind."""
    state = {k: v.to(torch.int32) if v.dim() == 0 else v for k, v in weights().items()}
    begin_from(cohort(students=1), [saved(tmp_path / "w.pth", state)], NAMES, 0)
    state["fc.weight"] = state["fc.weight"].to(torch.int32)
    with pytest.raises(UserError, match=r"w\.pth has fc\.weight in int32"):
        begin_from(cohort(students=1), [saved(tmp_path / "w.pth", state)], NAMES, 0)


def test_a_foreign_model_in_its_own_names(tmp_path: Path) -> None:
    """torchvision's keys have no ``net.``; an auxiliary classifier is left out, and said."""
    name = "torchvision:squeezenet1_1"
    net = create_model(name, 1000)
    plain = {net.published_key(key): value + 1 for key, value in net.state_dict().items()}
    plain["aux1.fc.weight"] = torch.zeros(2, 2)
    save_file(plain, tmp_path / "squeezenet.safetensors")
    made = cohort(name, 2)
    notes = begin_from(made, [tmp_path / "squeezenet.safetensors"], NAMES, 0)
    own = made.student_state(1)["net.features.0.weight"]
    assert torch.equal(own, plain["features.0.weight"])
    assert "aux1.fc.weight" in notes[1]
    assert "classifier.1.weight" in notes[2]


def test_an_authors_cohort_gives_its_leader(tmp_path: Path) -> None:
    made = Cohort(("resnet32", 2), 10, sharing="branch")
    state = made.state_dict()
    theirs = {}
    for key, value in state.items():
        where, rest = key.split(".", 1)
        if where == "trunk":
            theirs[rest] = value
        else:
            s, rest = rest.split(".", 1)
            theirs[rest.replace("layer3.", f"layer3_{s}.").replace("fc.", f"classifier3_{s}.")] = (
                value
            )
    file = saved(tmp_path / "last.pth", {"state_dict": theirs, "epoch": 1})
    other = Cohort(("resnet32", 1), 10, sharing="network", seed=5)
    begin_from(other, [file], [str(c) for c in range(10)], 0)
    assert same(other.student_state(0), made.student_state(0)) >= {"conv1.weight", "fc.weight"}


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights()
    lacking = {k: v for k, v in state.items() if k != "conv1.weight"} | {
        "head.weight": torch.ones(1)
    }
    wide = {**state, "conv1.weight": torch.ones(64, 3, 7, 7)}
    saved(tmp_path / "code.pth", Hostile())
    save_file(lacking, tmp_path / "lacking.safetensors")
    two = {**behind("student.", state), **behind("teacher.", state)}
    cases = [
        (
            [saved(tmp_path / "two.pth", two).name],
            r"several state dicts, student\., teacher\., and",
        ),
        (["lacking.safetensors"], r"1 missing: conv1.weight; 1 extra: head.weight"),
        ([saved(tmp_path / "wide.pth", wide).name], r"conv1.weight \(\[64, 3, 7, 7\], not"),
        (["code.pth"], "could run code"),
        (["nowhere.pth"], "no such file"),
        ([saved(tmp_path / "list.pth", [1]).name], "holds no state dict, but a list"),
        ([saved(tmp_path / "words.pth", {"lr": 1}).name], "no state dict: it has 'lr'"),
        (["wide.pth", "wide.pth"], "names 2 files for 3 students"),
    ]
    for files, says in cases:
        with pytest.raises(UserError, match=says):
            begin_from(cohort(), [tmp_path / file for file in files], NAMES, 0)
    three = [saved(tmp_path / f"{i}.pth", state) for i in range(3)]
    with pytest.raises(UserError, match="shares a trunk"):
        begin_from(cohort(sharing="branch"), three, NAMES, 0)
    with pytest.raises(UserError, match="initialise both"):
        begin_from(Cohort(["resnet8", "resnet14"], 7, sharing="network"), three[:1], NAMES, 0)
    assert capsys.readouterr().out == ""


def test_a_run_from_a_run_and_on_without_it(tmp_path: Path) -> None:
    """The kept student's weights go on; a resumed run needs the file no more."""
    first = train(recipe("okddip-branch@2/resnet8/digits"), SHORT, out=tmp_path / "first")
    student = tmp_path / "first/student.safetensors"
    tuned = recipe("dml@2/resnet8/digits", lr=1e-30)
    options = dataclasses.replace(SHORT, init=(str(student),))
    run = train(tuned, options, out=tmp_path / "tuned")
    begun = json.loads((run.folder / "environment.json").read_text())
    assert begun["init"] == [str(student)]
    ours, theirs = read_weights(run.folder).state, read_weights(first.folder).state
    assert {"conv1.weight", "fc.weight"} <= same(ours, theirs)
    student.unlink()
    again = train(tuned, SHORT, out=run.folder, resume=True, max_steps=2)
    assert again.last["step"] == 2
    assert "fc.weight" in same(read_weights(run.folder).state, theirs)
    other = dataclasses.replace(SHORT, init=("other.pth",))
    with pytest.raises(UserError, match="--init"):
        train(tuned, other, out=run.folder, resume=True, max_steps=3)
