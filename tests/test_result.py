"""Python: a run by its recipe's name, and what a run gives."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastokd
from fastokd.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, run_checkpoint
from fastokd.errors import UserError
from fastokd.run.options import RunOptions

NAME = "okddip-branch/resnet8/digits"
QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fastokd.Run:
    """By a name, with settings of the recipe and of its method, and options."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    settings = {"epochs": 2, "students": 2, "batch_size": 50, "temperature": 2.5}
    return fastokd.train(NAME, out=out, **settings, **QUICK)


def test_settings_and_options_go_where_they_belong(run: fastokd.Run) -> None:
    assert isinstance(run, fastokd.Run)
    recipe = fastokd.recipe(NAME, epochs=2, students=2, batch_size=50, temperature=2.5)
    assert run.recipe == recipe
    assert fastokd.Run.load(str(run.folder)) == run


def test_a_run_in_a_few_lines(run: fastokd.Run) -> None:
    first, second, third = repr(run).splitlines()
    assert first == f"Run of {NAME}, seed 0, in {run.folder}"
    assert second == "  2 of 2 epochs, 4 steps"
    assert re.fullmatch(
        r"  test top-1 of the leader: 0\.\d{4} last \(epoch 2\), 0\.\d{4} best \(epoch [12], chosen "
        r"on val\)",
        third,
    )
    none = fastokd.Run(run.folder, run.recipe, [])
    assert repr(none).splitlines()[-1] == "  no measured epoch yet"


def test_the_best_epoch_is_the_best_checkpoint_s(run: fastokd.Run) -> None:
    scores = [row["val"]["leader_top1"] for row in run.metrics]
    assert run.best == run.metrics[scores.index(max(scores))]
    (kept,) = list_checkpoints(run.folder / "checkpoints", "best")
    assert kept.name == f"best-{run.best['step']:09d}"
    worse = fastokd.Run(run.folder, run.recipe, [dict(row) for row in run.metrics])
    worse.metrics[0]["val"] = {**worse.metrics[0]["val"], "leader_top1": 2.0}
    assert worse.best is worse.metrics[0]


def test_its_student_scores_as_the_run_says(run: fastokd.Run) -> None:
    data = fastokd.data.load_dataset("digits").test
    images_BCHW = run.preprocessing.normalized(data.images_NHWC)
    for index, best in ((None, False), (0, False), (None, True)):
        network = run.student(index, best=best)
        assert not network.training
        with torch.no_grad():
            logits_BC = torch.cat([network(part) for part in images_BCHW.split(250)])
        top1 = (logits_BC.argmax(1) == data.labels_N).double().mean().item()
        row = run.best if best else run.last
        wanted = row["test"]["student_top1"][1 if index is None else index]
        assert top1 == pytest.approx(wanted, abs=2e-3)
    with pytest.raises(UserError, match="student is 7"):
        run.student(7)


def test_a_run_stands_for_its_folder(run: fastokd.Run, tmp_path: Path) -> None:
    assert os.fspath(run) == str(run.folder)
    assert fastokd.evaluate(run, device="cpu", precision="fp32")["test"] == run.last["test"]
    assert fastokd.export(run, "safetensors", tmp_path / "out").folder == tmp_path / "out"
    Image.new("L", (32, 32)).save(tmp_path / "0.png")
    (found,) = fastokd.predict(run, [tmp_path / "0.png"], top=1)
    assert found.classes[0] in map(str, range(10))
    assert RunOptions(teacher=run, init=run).init == (str(run.folder),)  # type: ignore[arg-type]


def test_its_page_and_its_figures(run: fastokd.Run, tmp_path: Path) -> None:
    assert run.report() == run.folder / "report.html"
    assert run.report(str(tmp_path / "page.html")).is_file()
    assert "<svg" in run.plot()._repr_svg_()
    assert "<svg" in run.plot("loss")._repr_svg_()
    with pytest.raises(UserError, match=r"unknown figure 'accuracies': did you mean accuracy\?"):
        run.plot("accuracies")


def test_what_the_first_hour_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/start.md's Python, with a run of two steps."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs/start.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    small = "epochs=1, batch_size=50, quiet=True, engine='loop', precision='fp32', device='cpu'"
    assert code.count("epochs=10") == 1
    names = {"images_BHWC": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)}
    exec(code.replace("epochs=10", small), names)
    assert names["logits_BC"].shape == (2, 10)
    assert (tmp_path / "runs/python/export/onnx/resnet8.onnx").is_file()


def test_a_string_is_as_good_as_a_path(run: fastokd.Run) -> None:
    checkpoints = str(run.folder / "checkpoints")
    assert newest_checkpoint(checkpoints)[0] == run_checkpoint(str(run.folder))[0]
    assert load_checkpoint(str(list_checkpoints(checkpoints)[0]))[1]["step"] == 4
    assert RunOptions(init="a.pth").init == ("a.pth",)  # type: ignore[arg-type]
    assert RunOptions(init=[Path("a.pth"), "b.pth"]).init == ("a.pth", "b.pth")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_step": 3}, r"unknown setting 'max_step': did you mean max_steps\?"),
        ({"data_rot": "x"}, r"unknown setting 'data_rot': did you mean data_root\?"),
        ({"epoch": 3}, r"unknown setting 'epoch': did you mean epochs"),
        ({"epochs": "3"}, r"epochs must be a whole number \(got '3'\)"),
        ({"max_steps": "3"}, r"max_steps must be a whole number \(got '3'\)"),
        ({"out": 3}, r"out must be a path \(got 3\)"),
        ({"data_root": ["x"]}, r"data_root must be a path \(got \['x'\]\)"),
        ({"init": 3}, r"init must be a path or a list of paths \(got 3\)"),
        ({"quiet": "no"}, r"quiet must be true or false \(got 'no'\)"),
        ({"ema": "0.9"}, r"ema must be a number \(got '0.9'\)"),
        ({"engine": None}, r"engine must be a word \(got None\)"),
        ({"options": {"out": "x"}}, r"options is \{'out': 'x'\}: give a fastokd.RunOptions"),
    ],
)
def test_a_wrong_keyword_is_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        fastokd.train(NAME, **changes)


def test_wrong_types_are_named() -> None:
    recipe = fastokd.recipe(NAME)
    with pytest.raises(
        UserError, match=r"max_step=3 is no option of a run: did you mean max_steps"
    ):
        fastokd.train(recipe, max_step=3)
    with pytest.raises(UserError, match=r"the recipe is 5: give a name"):
        fastokd.train(5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"must be a path \(got 5\)"):
        fastokd.evaluate(5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"device must be a word \(got 1\)"):
        fastokd.evaluate("nowhere", device=1)
    for read in (fastokd.Run.load, fastokd.resume, load_checkpoint, run_checkpoint):
        with pytest.raises(UserError, match=r"must be a path \(got None\)"):
            read(None)  # type: ignore[operator]


def test_wrong_types_of_arguments_are_named(run: fastokd.Run) -> None:
    for call, says in (
        (lambda: fastokd.authors.load(5), r"the checkpoint must be a path \(got 5\)"),
        (lambda: run.student("a"), r"student must be a whole number \(got 'a'\)"),
        (lambda: fastokd.export(run, 5), "unknown format 5: there is"),
        (lambda: fastokd.export(5, "onnx"), r"source must be a path \(got 5\)"),
        (lambda: fastokd.predict(run, 5), "images must be a path, a pattern or a list of them"),
        (lambda: fastokd.predict(run, [5]), r"image must be a path \(got 5\)"),
        (
            lambda: fastokd.predict(5, run.folder / "recipe.json"),
            r"student must be a path \(got 5\)",
        ),
        (lambda: run.plot(5), "unknown figure 5: there is"),
    ):
        with pytest.raises(UserError, match=says):
            call()
