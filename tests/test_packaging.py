"""What ``pip install .`` puts on a machine: the whole package, kernels and C++ sources included."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import fastokd

ROOT = Path(__file__).parent.parent


PACKAGES = {"fastokd": "fastokd", "kernels": "fastokd/kernels", "csrc": "fastokd/csrc"}
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


class Release(NamedTuple):
    """What ``python -m build`` makes, and the sources that it was made from."""

    sources: Path
    sdist: Path
    wheel: Path


def build(kind: str, sources: Path, out: Path) -> Path:
    """Calls the build backend as pip and build do; returns the one file that is in ``out`` then."""
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Built from a copy of the sources, without the files that git ignores."""
    here = tmp_path_factory.mktemp("release")
    sources = here / "sources"
    shutil.copytree(
        ROOT,
        sources,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache"
        ),
    )
    return Release(
        sources, build("sdist", sources, here / "sdist"), build("wheel", sources, here / "wheel")
    )


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.proof
def test_the_wheel_is_whole(release: Release) -> None:
    held = contents(release.wheel)
    for folder, package in PACKAGES.items():
        for where, _, names in os.walk(release.sources / folder):
            for name in names:
                source = Path(where) / name
                if not source.is_symlink():
                    place = f"{package}/{source.relative_to(release.sources / folder)}"
                    assert held[place] == source.read_bytes(), place


@pytest.mark.proof
def test_a_wheel_of_the_sdist_is_the_same(release: Release, tmp_path: Path) -> None:
    """The sdist has the tests, the docs and all that they read, too."""
    with tarfile.open(release.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (sources,) = tmp_path.iterdir()
    wheel = build("wheel", sources, tmp_path / "wheel")
    assert contents(wheel) == contents(release.wheel)
    for folder in ("bench", "docs", "tests"):
        for original in (release.sources / folder).rglob("*"):
            copy = sources / original.relative_to(release.sources)
            assert copy.is_dir() if original.is_dir() else copy.is_file(), copy
    for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"):
        assert (sources / name).is_file(), name


@pytest.mark.proof
def test_the_wheel_trains_in_a_clean_environment(release: Release, tmp_path: Path) -> None:
    """A new virtual environment that has fastokd's dependencies, and the repository nowhere."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python, program = (str(environment / "bin" / name) for name in ("python", "fastokd"))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # A folder that a .pth file names has no say for its own .pth files: an editable fastokd stays out.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(filter(str.strip, site_folders())))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    call(*pip, "--no-deps", "--no-index", "--ignore-installed", str(release.wheel))

    where = call(python, "-c", "import fastokd, sys; print(fastokd.__file__, *sys.path)")
    assert where.startswith(str(site))
    assert str(ROOT) not in where.replace(str(Path(sys.prefix)), "")
    assert "okddip-branch/resnet32/cifar100" in call(program, "list", "recipes")
    call(program, "train", "okddip-branch/resnet8/digits", "--epochs", "1", "--out", "run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert "leader_top1" in call(program, "evaluate", "run", "--json")


def site_folders() -> list[str]:
    """Where this environment's packages lie."""
    return [
        folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")
    ]


def test_versions_agree() -> None:
    """Of the package, its metadata, the citation and the newest entry of the changelog."""

    def only(pattern: str, file: str) -> str:
        return re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)[0]

    assert only(r'^version = "(.+)"', "pyproject.toml") == fastokd.__version__
    assert only(r"^version: (.+)", "CITATION.cff") == fastokd.__version__
    assert only(r"^## ([\d.]+)", "CHANGELOG.md") == fastokd.__version__


def test_every_package_is_listed() -> None:
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    found = {"fastokd.kernels", "fastokd.csrc"}
    for init in (ROOT / "fastokd").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(re.findall(r'"(.+?)"', listed[1])) == found


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
