"""docs/your-data.md and docs/your-method.md do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
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
from fastokd.run.worker import Worker

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
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for index in range(11):
            noise = generator.integers(0, 99, (40, 48, 3)) + 100 * label
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.jpg")
    (tmp_path / "pictures/cat/0.jpg").rename(tmp_path / "my-cat.jpg")
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    train, predict, export, tune, tune_foreign, *fashion = commands("your-data.md")
    run(train, "--batch-size", "4", *SHORT)
    run(predict)
    run(export)
    assert (tmp_path / "runs/pictures/export/onnx/resnet20.onnx").is_file()
    for arguments in (tune, tune_foreign):
        run(arguments, "--batch-size", "4", *SHORT)
    for name in ("clothes", "few"):
        shutil.copytree(tmp_path / "pictures", tmp_path / "fashion" / name)
    for arguments in fashion:
        run(arguments, "--batch-size", "4", *SHORT)


@pytest.fixture
def own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's method in the working directory, which isn't on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    (code,) = blocks("your-method.md", "python")
    (tmp_path / "my_methods.py").write_text(code)
    return "my_methods:BestTeacher"


def test_an_own_method_in_a_page(
    own_method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, report = commands("your-method.md")
    run(train, *SHORT, "--set", "temperature=2")
    kept = json.loads((tmp_path / "runs/best/recipe.json").read_text())
    assert kept["method"] == own_method
    assert kept["name"] == f"{own_method}-network/resnet8/digits"
    assert kept["method_options"] == {"temperature": 2}
    run(train, *SHORT[:1], "3", *SHORT[2:], "--set", "temperature=2", "--resume")
    run(report)
    run(["evaluate", "runs/best", f"--method={own_method}"])
    monkeypatch.setattr("fastokd.methods._OWN", {})
    run(report)  # needs no code
    for command in ("evaluate", "export --to safetensors"):
        assert run_command([*command.split(), "runs/best"]) == 2
        assert f"add --method {own_method}" in capsys.readouterr().err, command
    assert own_method not in list_methods()


def test_the_schedule_of_an_own_method_is_said(
    own_method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [word for word in SHORT if word != "--quiet"]
    run(["train", "dml/resnet8/digits", "--method", own_method, "--epochs", "3", *loud])
    said = capsys.readouterr().out
    assert "schedule for 3 epochs: rate / 10 after epoch 2 (1 of 2 milestones" in said


def test_an_own_method_reaches_the_processes_of_trials(own_method: str, tmp_path: Path) -> None:
    code = "from my_methods import BestTeacher\ndef make(job): return [BestTeacher.__name__, job], None"
    (tmp_path / "beside_it.py").write_text(code)
    run(["list", "models", "--method", own_method])
    with Worker("beside_it:make", 3, threads=1, seconds=120, quiet=True) as worker:
        assert worker.first == ["BestTeacher", 3]


def test_the_error_for_an_own_method_says_what_is_wrong(own_method: str, tmp_path: Path) -> None:
    del own_method
    (tmp_path / "broken.py").write_text("import torch\n\nclass Mine(torch.Nothing):\n    pass\n")
    (tmp_path / "unfinished.py").write_text("class Mine(")
    (tmp_path / "needing.py").write_text("import not_installed_here")
    for name, says in (
        ("nowhere:Mine", rf"there is no nowhere.py .* in the working directory {tmp_path}"),
        ("my_methods.inner:Mine", "my_methods has no module inner"),
        ("my_methods:Best", r"has no Best \(its methods are BestTeacher\)"),
        ("broken:Mine", r"importing broken raised AttributeError.*\(line 3\); --debug"),
        ("unfinished:Mine", "importing unfinished raised SyntaxError"),
        ("needing:Mine", "importing needing raised .*No module named 'not_installed_here'"),
    ):
        sys.path.insert(0, str(tmp_path))
        with pytest.raises(UserError, match=says):
            register_method(name)


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


def test_an_own_method_is_named_anywhere_on_the_command_line(
    own_method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the command, too, and where a run's folder is called as a command."""
    named = ["dml/resnet8/digits", "--print-recipe"]
    for arguments in (
        ["--method", own_method, "train", *named],
        ["train", *named, f"--method={own_method}"],
    ):
        assert run_command(arguments) == 0
        assert json.loads(capsys.readouterr().out)["method"] == own_method
    run(["train", "dml/resnet8/digits", "--method", own_method, *SHORT, "--out", "train"])
    assert run_command(["report", "train", "--method", own_method]) == 0
    assert run_command(["train", *named, "--method", "--quiet"]) == 2
    assert "--method needs a value: name your method" in capsys.readouterr().err


def test_files_beside_an_own_method_hide_no_module(own_method: str, tmp_path: Path) -> None:
    """In a process of its own, where neither torch nor what it imports is loaded yet."""
    for name in ("profile", "secrets", "random"):
        (tmp_path / f"{name}.py").write_text("x = 1")
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; from fastokd.cli import run_command; "
    )
    code += f"sys.exit(run_command(['train', 'dml/resnet8/digits', '--method', '{own_method}', '--print-recipe']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
