"""What ``pip install .`` puts on a machine: the whole package, kernels and C++ sources included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.proof
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """Built from a copy of the sources, imported from elsewhere, it works."""
    sources = [name.name for name in ROOT.iterdir() if name.is_file()]
    for folder in ("fastokd", "kernels", "csrc"):
        for where, _, names in os.walk(ROOT / folder):
            inside = Path(where).relative_to(ROOT)
            sources += [str(inside / name) for name in names if "__pycache__" not in inside.parts]
    for name in sources:
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [
            *pip,
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(tmp_path / "source"),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("fastokd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for name in sources:
        if name.startswith(("fastokd/", "kernels/", "csrc/")):
            place = name if name.startswith("fastokd/") else f"fastokd/{name}"
            assert place in held, name

    program = (
        "import fastokd, fastokd.kernels, fastokd.csrc, sys;"
        "from fastokd.data import load_dataset;"
        "assert fastokd.__file__.startswith(sys.path[0]), fastokd.__file__;"
        "assert fastokd.kernels.__file__.startswith(sys.path[0]);"
        "assert len(load_dataset('digits').train) == 500;"
        "from fastokd.cli import run_command; sys.exit(run_command(['list', 'recipes']))"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {program}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "okddip-branch/resnet32/cifar100" in done.stdout


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    build = text.split("[build-system]")[1].split("[project]")[0]
    assert "torch" not in build


def test_the_oldest_versions_are_those_that_make_test_oldest_takes() -> None:
    pins = dict(
        re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    )
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "torchvision", "triton"):
        (floor,) = re.findall(rf'"{name}>=([\d.]+)', project)
        assert pins.pop(name) == f"{floor}.0"
    assert not pins


def test_apex_is_no_dependency() -> None:
    """The package of that name on PyPI is another program."""
    assert "apex" not in (ROOT / "pyproject.toml").read_text()
