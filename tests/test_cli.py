"""The commands: what they print, and one clear sentence with exit code 2 for what is wrong."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastokd import cli
from fastokd.commands.help import keep_docstrings
from fastokd.device import pick_device
from fastokd.doctor import OPTIONAL
from fastokd.errors import UserError, unknown_name
from fastokd.run.options import RunOptions

ROOT = Path(__file__).parents[1]
RECIPE = "okddip-branch/resnet8/digits"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("what", ["models", "methods", "datasets", "recipes"])
def test_list(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, _ = run(capsys, "list", what, "--json")
    names = json.loads(out)
    assert code == 0
    assert names
    assert all(isinstance(name, str) for name in names)
    assert run(capsys, "list", what)[1].split() == names


def test_list_alone_says_what_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert code == 0
    every = json.loads(run(capsys, "list", "--json")[1])
    assert list(every) == ["models", "methods", "datasets", "recipes", "styles", "settings"]
    for what, names in every.items():
        assert f"{len(names)} {what}: fastokd list {what}" in out
        assert json.loads(run(capsys, "list", what, "--json")[1]) == names


def test_every_listed_recipe_resolves() -> None:
    from fastokd.recipe.names import list_recipes, recipe

    for name in list_recipes():
        assert recipe(name).name == name


def test_model_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "model-info", "resnet32", "--num-classes", "10", "--json")
    assert code == 0
    assert json.loads(out) == {
        "name": "resnet32",
        "params": 466906,
        "macs": 69124736,
        "feature_dim": 64,
        "maps": [[16, 32, 32], [32, 16, 16], [64, 8, 8]],
    }


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["impls"]["torch"] == "works"
    assert re.match(r"\d+ threads? on \d+ CPUs? \(", facts["cpus"])
    assert Path(facts["cache"]).is_absolute()
    assert facts["optional"]["apex"] != "works"


def test_doctor_knows_every_optional_package() -> None:
    """Those that the code imports and an installation doesn't need."""
    project = (ROOT / "pyproject.toml").read_text()
    (needed,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    needed += "sklearn> PIL> vl_convert>"  # imported under other names than they are installed
    found = set()
    for path in (ROOT / "fastokd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Later":
                found.add(ast.literal_eval(node.args[0]))
    found = {name.partition(".")[0] for name in found} - {"fastokd", *sys.stdlib_module_names}
    found = {name for name in found if f"{name}>" not in needed}
    assert found >= {"wandb", "timm", "onnx"}
    # DALI's package has another name; apex is another line of doctor's.
    assert found - {"nvidia", "apex"} <= OPTIONAL.keys()


def test_print_recipe_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "okddip-branch/resnet32/cifar100", "--print-recipe")
    values = json.loads(out)
    assert code == 0
    papers = {
        "students": 4,
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "milestones": [150, 225],
        "ramp_epochs": 80.0,
        "crop_padding": 4,
        "crop_mode": "zeros",
        "flip": True,
    }
    assert {name: values[name] for name in papers} == papers


def test_epochs_scale_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    name = "okddip-branch/resnet32/cifar100"
    _, out, _ = run(capsys, "train", name, "--epochs", "30", "--print-recipe")
    values = json.loads(out)
    assert (values["milestones"], values["ramp_epochs"]) == ([15, 22], 8.0)


COMMANDS = [
    "bench",
    "clean",
    "compare",
    "convert",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "list",
    "model-info",
    "plan",
    "predict",
    "prepare",
    "report",
    "reproduce",
    "runs",
    "train",
    "watch",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command([command, "--help"]) == 0
    assert f"Example: fastokd {command}" in capsys.readouterr().out


def test_no_command_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["--help"]) == 0
    commands = capsys.readouterr().out.split("Commands:")[1]
    assert sorted(re.findall(r"^  (\S+)  +\S", commands, re.MULTILINE)) == COMMANDS
    assert "..." not in commands, "a summary doesn't fit into its line"


def test_help_texts_outlive_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ``python -OO``."""
    callbacks = [command.callback for command in cli.app.registered_commands]
    callbacks += [command.callback for command in cli.bench.registered_commands]
    callbacks.append(cli.bench.registered_callback.callback)  # type: ignore[union-attr]
    texts = [inspect.getdoc(callback) for callback in callbacks]
    assert all(texts)
    for callback in callbacks:
        monkeypatch.setattr(callback, "__doc__", None)
    keep_docstrings(cli.app)
    assert [inspect.getdoc(callback) for callback in callbacks] == texts


@pytest.mark.proof
def test_optimised_python_runs_and_has_the_same_help(tmp_path: Path) -> None:
    texts = []
    for flag in ("-O", "-OO"):
        said = [
            subprocess.run(
                [sys.executable, flag, "-m", "fastokd", *words, "--help"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for words in ([], ["train"], ["bench"], ["bench", "step"])
        ]
        texts.append(said)
    assert texts[0] == texts[1]
    small = [
        "--epochs",
        "1",
        "--max-steps",
        "2",
        "--engine",
        "loop",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-OO", "-m", "fastokd", "train", RECIPE, *small]
    subprocess.run(command, check=True)
    assert (tmp_path / "run/student.safetensors").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--debug", "train", "okdip-branch/resnet8/digits")
    assert code == 2
    assert "Traceback" in err


def test_train_evaluate_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    flags = ["--out", out, "--students", "2", "--batch-size", "50", "--epochs", "2"]
    code, printed, _ = run(capsys, "train", RECIPE, *flags, "--max-steps", "1")
    assert code == 0
    assert "rate / 10 after epoch 1 (1 of 2 milestones" in printed
    assert "images/s" in printed
    code, _, err = run(capsys, "train", RECIPE, *flags)
    assert code == 2
    assert "--resume" in err
    assert run(capsys, "train", RECIPE, *flags, "--resume", "--quiet")[:2] == (0, "")
    code, printed, _ = run(capsys, "evaluate", out, "--json")
    assert code == 0
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    assert json.loads(printed)["test"] == rows[-1]["test"]


def test_where_there_is_no_name_none_is_offered() -> None:
    assert str(unknown_name("option", "warmth", [])) == "unknown option 'warmth': there is none"


def test_of_many_names_the_rest_is_counted() -> None:
    names = [f"{number:02}" for number in range(62)]
    for count, end in ((60, "58, 59"), (61, "58, 59 and 1 more"), (62, "58, 59 and 2 more")):
        assert str(unknown_name("option", "warmth", names[:count])).endswith(end)


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "Usage: fastokd" in out


def test_interrupted_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastokd.list_models", interrupted)
    assert run(capsys, "list", "models") == (130, "", "fastokd: interrupted\n")
    monkeypatch.setattr("fastokd.commands.train.wanted_runs", interrupted)
    code, _, err = run(capsys, "train", RECIPE)
    assert (code, err) == (
        130,
        "fastokd: interrupted; --resume continues a run that has saved a checkpoint\n",
    )


def test_interrupted_while_it_loads_it_ends_in_silence(tmp_path: Path) -> None:
    """As a program ends that has not begun: by the signal."""
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    command = [sys.executable, "-m", "fastokd", "list", "models"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    # What starts the tests may have ignored it, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_loaded_it_can_be_interrupted_as_any_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        signal.raise_signal(signal.SIGINT)
        return []

    monkeypatch.setattr("fastokd.list_models", interrupted)
    monkeypatch.setattr(sys, "argv", ["fastokd", "list", "models"])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130


def test_a_log_has_a_line_an_epoch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where the output is no terminal, nothing is wrapped at a width that nobody has."""
    flags = ["--out", str(tmp_path / "run"), "--students", "2", "--batch-size", "50"]
    code, printed, _ = run(capsys, "train", RECIPE, *flags, "--max-steps", "1")
    assert code == 0
    (line,) = [line for line in printed.splitlines() if line.startswith("epoch")]
    assert len(line) > 80
    assert " s" in line.rsplit("left", 1)[1]


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2', but this machine's last GPU is cuda:1"):
        pick_device("cuda:2")


def test_every_option_of_train_is_the_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No option is dropped on the way; each is given a value that isn't its default."""
    asked: dict[str, object] = {
        "data_root": tmp_path / "data",
        "download": True,
        "device": "cpu",
        "precision": "fp32",
        "engine": "loop",
        "compile": True,
        "memory_format": "contiguous",
        "capture": True,
        "streams": True,
        "impl": "torch",
        "loader": "torchvision",
        "workers": 3,
        "teacher": ("c.safetensors", "d.safetensors"),
        "init": ("a.pth", "b.pth"),
        "out": tmp_path / "run",
        "resume": True,
        "max_steps": 7,
        "overfit_batch": True,
        "apex": True,
        "accumulate": 2,
        "clip_norm": 0.5,
        "checkpoint_activations": True,
        "skip_nonfinite": 4,
        "eval_every": 5,
        "save_every_steps": 6,
        "save_every_minutes": 2.5,
        "parallel": "students",
        "sync_bn": True,
        "deterministic": True,
        "show_augmentation": True,
        "tensorboard": True,
        "wandb": True,
        "quiet": True,
    }
    assert asked.keys() == {field.name for field in dataclasses.fields(RunOptions)}
    given: list[str] = []
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else (value,):
            given += [flag] if one is True else [flag, str(one)]
    runs: list[RunOptions] = []

    def record(_: object, options: RunOptions) -> None:
        runs.append(options)

    monkeypatch.setattr(importlib.import_module("fastokd.train"), "train", record)
    assert run(capsys, "train", RECIPE, *given) == (0, "", "")
    assert [dataclasses.asdict(options) for options in runs] == [asked]
