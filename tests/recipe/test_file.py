"""A recipe's TOML file: what ``--print-recipe toml`` writes is read as the same recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import fastokd
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.file import as_toml
from fastokd.recipe.names import recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIGITS = "okddip-branch/resnet8/digits"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (DIGITS, {}),
        (DIGITS, {"epochs": 7, "lr": 1e-05, "seed": 3, "temperature": 4.0, "val": 0.1}),
        ("ffsd/resnet20/cifar100", {"milestones": (), "reported": "mean"}),
        ("dml-network/vgg16+resnet32/cifar10", {}),
        ("kdcl/torchvision:resnet18/imagenet", {"epochs": 30, "teacher": 'q"\\\n\x7f\u00e9'}),
    ],
)
def test_a_written_file_is_the_same_recipe(
    tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    wanted = recipe(name, **changes)
    path = tmp_path / "experiment.toml"
    path.write_text(as_toml(wanted, recipe(name)), "utf-8")
    assert recipe(str(path)) == wanted


def test_what_differs_comes_first(tmp_path: Path) -> None:
    base = recipe(DIGITS)
    differing = as_toml(recipe(DIGITS, lr=0.3), base).split("# Its other settings")[0]
    assert tomllib.loads(differing) == {"recipe": DIGITS, "lr": 0.3}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "notepad.toml"
    path.write_text(f'recipe = "{DIGITS}"\n', "utf-8-sig")
    assert recipe(str(path)) == recipe(DIGITS)


def test_a_file_is_a_base_for_further_changes(tmp_path: Path) -> None:
    path = tmp_path / "half.toml"
    path.write_text(f'recipe = "{DIGITS}"\nepochs = 30\nlr = 0.3\ntemperature = 2\n')
    changed = recipe(str(path), epochs=10, lr=0.2)
    # The schedule is the file's, for 30 epochs (15, 22), scaled.
    assert changed == recipe(DIGITS, epochs=10, milestones=(5, 7), lr=0.2, temperature=2.0)


def test_train_takes_a_file_and_names_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('recipe = "baseline/resnet8/digits"\nlr = 0.05\nseed = 4\n')
    assert run_command(["train", "mine.toml", "--max-steps", "1", "--engine", "loop"]) == 0
    recipe_json = (tmp_path / "runs/mine-seed4/recipe.json").read_text()
    assert json.loads(recipe_json)["seed"] == 4
    run = fastokd.train("mine.toml", seed=1, max_steps=1, engine="loop", quiet=True)
    assert run.folder == Path("runs/mine-seed1")
    assert run.recipe.lr == 0.05
    assert run_command(["train", "mine.toml", "--seeds", "2,3", "--print-recipe", "toml"]) == 0
    written = capsys.readouterr().out
    assert "seed = 2" in written
    assert "lr = 0.05" in written


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr = = 2", "isn't TOML"),
        ("lr = 2", "names no recipe"),
        ("recipe = 3", "recipe must be a recipe's name"),
        (f'recipe = "{DIGITS}"\nmodel = "resnet20"', "sets model, which the recipe's name says"),
        (f'recipe = "{DIGITS}"\nwieght_decay = 0', "did you mean weight_decay"),
        (f'recipe = "{DIGITS}"\nlr = "high"', "lr must be a number"),
        (f'recipe = "{DIGITS}"\nlr = 2025-01-01', "lr must be a number"),
        (f'recipe = "{DIGITS}"\nlr = inf', "lr is inf"),
        (f'recipe = "{DIGITS}"\n[lr]\na = 1', "lr must be a number"),
        ('recipe = "okdip-branch/resnet8/digits"', "okddip"),
        ("\0", "isn't TOML"),
        (f'recipe = "{DIGITS}"\nlr = {"9" * 5000}', "isn't TOML"),
        pytest.param(f'recipe = "{DIGITS}"\n#{"x" * (1 << 20)}\nlr = 2', "more than", id="large"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        recipe(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"can't read the recipe gone\.toml: No such file"):
        recipe("gone.toml")
