"""docs/your-data.md and docs/your-method.md do what they say."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.methods import list_methods, register_method
from fastokd.recipe.names import recipe

DOCS = Path(__file__).parents[1] / "docs"
SHORT = ["--max-steps", "2", "--quiet", "--engine", "loop", "--device", "cpu"]


def blocks(page: str, language: str) -> list[str]:
    """The code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The ``fastokd`` lines of a page's shell blocks, without the program's name."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("fastokd ")]


def run(arguments: list[str], *more: str) -> None:
    assert run_command([*arguments, *more]) == 0, arguments


def test_own_data_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 99, (40, 48, 3)) + 100 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.jpg")
    (tmp_path / "pictures/val/cat/0.jpg").rename(tmp_path / "my-cat.jpg")
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    train, predict, export, tune, tune_foreign = commands("your-data.md")
    run(train, "--batch-size", "4", *SHORT)
    run(predict)
    run(export)
    assert (tmp_path / "runs/pictures/export/onnx/resnet20.onnx").is_file()
    for arguments in (tune, tune_foreign):
        run(arguments, "--batch-size", "4", *SHORT)


def test_an_own_method_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    (code,) = blocks("your-method.md", "python")
    (tmp_path / "my_methods.py").write_text(code)
    train, report = commands("your-method.md")
    run(train, *SHORT, "--set", "temperature=2")
    kept = json.loads((tmp_path / "runs/best/recipe.json").read_text())
    assert kept["method"] == "my_methods:BestTeacher"
    assert kept["name"] == "my_methods:BestTeacher-network/resnet8/digits"
    assert kept["method_options"] == {"temperature": 2}
    run(report)
    run(["evaluate", "runs/best", "--method=my_methods:BestTeacher"])
    assert "my_methods:BestTeacher" not in list_methods()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Method", "can't be loaded"),
        ("json:JSONDecoder", "no subclass"),
        ("json:nothing", "can't be loaded"),
        ("okddip", "name it as package.module:Class"),
        ("", "name it as package.module:Class"),
    ],
)
def test_what_is_no_method_is_said(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_method(name)


def test_a_recipe_loads_no_code_by_itself() -> None:
    """``antigravity`` would open a browser."""
    with pytest.raises(UserError, match="which a recipe alone doesn't load"):
        recipe("dml/resnet8/digits", method="antigravity:Method")
    assert "antigravity" not in sys.modules
