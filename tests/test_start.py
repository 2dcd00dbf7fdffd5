"""What only prints a text or a list of names imports no torch, and the package's names are right
whatever was imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastokd
from fastokd import known
from fastokd.data.registry import _LOADERS
from fastokd.methods import Method, method_class
from fastokd.models import model_spec
from tests.test_cli import COMMANDS

# Each takes a tenth of a second to seconds to import.
HEAVY = ("torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "rich", "safetensors")
LISTS = ("models", "methods", "datasets", "recipes")
FUNCTIONS = ("train", "evaluate", "recipe")


def in_a_new_process(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in (*COMMANDS, "bench step")),
        *(["list", what, *flags] for what in LISTS for flags in ([], ["--json"])),
    ],
    ids=" ".join,
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom fastokd.cli import run_command\n"
        "assert run_command(sys.argv[1:]) == 0\n"
        f"print('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    printed = in_a_new_process(program, *" ".join(arguments).split())
    assert printed.splitlines()[-1] == "imported:"
    assert len(printed.splitlines()) > 1


def test_the_version_is_printed() -> None:
    program = "from fastokd.cli import run_command; run_command(['--version'])"
    assert in_a_new_process(program) == f"fastokd {fastokd.__version__}\n"


def test_the_functions_hide_the_modules_of_their_names() -> None:
    """In whatever order: each in a fork of one process, which has loaded torch alone."""
    orders = [
        "import fastokd.train, fastokd.evaluate, fastokd.recipe",
        "import fastokd.recipe.names; from fastokd import recipe; import fastokd.train",
        "from fastokd.evaluate import evaluate; import fastokd; fastokd.train",
        "from fastokd import *; import fastokd.recipe.recipe, fastokd.train, fastokd.evaluate",
    ]
    checks = (
        "import fastokd, inspect, sys\nfrom fastokd import train, evaluate, recipe\n"
        f"for name in {FUNCTIONS}:\n"
        "    assert inspect.isfunction(getattr(fastokd, name)), name\n"
        "    assert inspect.ismodule(sys.modules[f'fastokd.{name}']), name\n"
        "assert fastokd.recipe is recipe and fastokd.train is train\n"
        "assert recipe('dml/resnet8/digits').students == 4\n"
    )
    program = (
        "import os, sys, traceback, torch\n"
        f"for imports in {orders}:\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        assert os.waitpid(child, 0)[1] == 0, imports\n"
        "        continue\n"
        "    assert 'fastokd' not in sys.modules\n"
        "    try:\n"
        f"        exec(imports + '\\n' + {checks!r}, {{}})\n"
        "    except BaseException:\n"
        "        traceback.print_exc()\n"
        "        os._exit(1)\n"
        "    os._exit(0)\n"
    )
    in_a_new_process(program)


def test_a_module_can_be_replaced_while_a_test_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests replace functions of the package."""
    monkeypatch.setattr("fastokd.train", len)
    assert fastokd.train is len
    monkeypatch.undo()
    assert fastokd.train.__module__ == "fastokd.train"


def test_the_package_has_its_names_and_its_modules() -> None:
    names: dict[str, object] = {}
    exec("from fastokd import *", names)
    assert {*fastokd.__all__} <= names.keys()
    assert {*fastokd.__all__} <= {*dir(fastokd)}
    assert fastokd.ops.mixture_distillation is fastokd.ops.mixture_distillation
    assert fastokd.authors.load.__module__ == "fastokd.student.authors"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastokd.nothing  # noqa: B018
    assert not hasattr(fastokd, "__main__")


def test_every_known_name_is_there() -> None:
    assert {*known.DATASETS} == _LOADERS.keys()
    for name in known.list_models():
        assert model_spec(name).name == name
    for name in known.list_methods():
        assert issubclass(method_class(name), Method)
