"""Every command that README and docs show is run, small; those that aren't say why."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastokd.cli import run_command
from fastokd.cohort import Cohort
from fastokd.data.photographs import write_photographs
from fastokd.data.sets import draw_glyphs, fashion_mnist
from fastokd.models import create_model
from fastokd.recipe.names import recipe
from fastokd.student import authors
from tests.data.make import write_cifar, write_fashion_mnist, write_folder, write_fonts
from tests.documented import (
    ELSEWHERE,
    NOT_RUN,
    ROOT,
    SMALLER,
    Command,
    commands,
    is_slow,
    pages,
    small,
    subcommand,
)
from tests.report.fake import FakeTrain

ALL = [command for page in pages() for command in commands(page)]
RUN = [
    command
    for command in ALL
    if command.words[0] in ("fastokd", "torchrun")
    and command.whole
    and command.text not in NOT_RUN
    and command.page not in ELSEWHERE
]
# A page takes for granted what another has the reader do.
FIRST = {
    "docs/deployment.md": [
        "fastokd train baseline/resnet20/imagefolder --data-root pictures --image-size 32 "
        "--out runs/pictures"
    ],
    "docs/authors.md": ["fastokd train ffsd/resnet32/cifar100 --data-root data"],
    "docs/methods/okddip_kd.md": ["fastokd train baseline/resnet110/cifar100 --data-root data"],
}
# Minutes with real runs: here their runs only write what runs leave (tests/report/fake.py).
MANY_RUNS = ("reproduce", "--seeds")


# The papers' schedules on real data, unless one of these shortens them.
LONG = re.compile(r"/(cifar10|cifar100|imagenet|fashion_mnist|imagefolder)$")
SHORTER = {"--epochs", "--max-steps", "--overfit-batch", "--print-recipe"}
# It reports a run that was stopped.
REPORTED = "docs/benchmarks.md"


def is_long(command: Command) -> bool:
    verb, name = (*command.words, "", "")[1:3]
    long = verb == "reproduce" or (verb == "train" and LONG.search(name) is not None)
    return long and not SHORTER & set(command.words)


@pytest.mark.parametrize("page", sorted({c.page for c in ALL if is_long(c)} - {REPORTED}))
def test_pages_say_that_a_run_takes_hours(page: str) -> None:
    assert re.search(r"\b(hour|day)s?\b", (ROOT / page).read_text())


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small ones of every data set and file that the pages name."""
    here = tmp_path_factory.mktemp("stand_ins")
    for name in ("cifar10", "cifar100"):
        write_cifar(here / "data", name, train=200, test=10)
    write_fashion_mnist(here / "debian")
    write_fonts(here / "fonts")
    for name in ("pictures", "flowers"):
        write_folder(here / name, splits=("train", "val"), size=(80, 80), count=4)
    for name in ("imagenet", "photographs"):
        write_photographs(here / name, classes=2, train=8, val=4, size=(96, 80))
    run_command(["prepare", "imagenet", "--data-root", str(here / "imagenet")])
    write_folder(here / "one", splits=("train",), classes=("cat",), count=1)
    weights = create_model("torchvision:resnet18", 2).state_dict()
    torch.save({k.removeprefix("net."): v for k, v in weights.items()}, here / "resnet18.pth")
    (here / "experiment.toml").write_text('recipe = "okddip-branch/resnet8/digits"\n')
    for name in ("picture.png", "picture.jpg"):
        shutil.copy(next((here / "one").rglob("*.png")), here / name)
    leader = create_model("resnet32", 100).state_dict()
    authors.save(here / "modelleader_best.pth", leader, model="resnet32")
    alone = create_model("resnet110", 100).state_dict()
    authors.save(here / "best.pth", alone, model="resnet110", paper="OKDDip")
    students = {
        f"stu{key.removeprefix('students.')}": value
        for key, value in Cohort(("resnet32", 2), 100, sharing="network").state_dict().items()
    }
    torch.save({"state_dict": students, "epoch": 1}, here / "best_of_two.pth")
    return here


@pytest.fixture
def sandbox(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    for file in stand_ins.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    # Where Debian's packages would be, whether this machine has them or not.
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(draw_glyphs, "TEXLIVE", tmp_path / "fonts")
    if "docs/authors.md" in request.node.name:
        (tmp_path / "best.pth").unlink()
        (tmp_path / "best.pth").symlink_to(stand_ins / "best_of_two.pth")
    return tmp_path


def parts(slow: bool) -> list[str]:
    """Pages with commands that are slow, or that aren't."""
    return sorted({command.page for command in RUN if is_slow(command.words) == slow})


@pytest.mark.parametrize(
    ("page", "slow"),
    [
        *((page, False) for page in parts(False)),
        *(pytest.param(page, True, marks=pytest.mark.proof) for page in parts(True)),
    ],
)
def test_the_commands_of_a_page(
    page: str,
    slow: bool,
    sandbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = FakeTrain(lambda recipe, epoch: 0.5)
    for text in FIRST.get(page, []):
        assert run_command(small(tuple(text.split()))) == 0, text
    of_page = [command for command in RUN if command.page == page]
    for command in [command for command in of_page if is_slow(command.words) == slow]:
        words = command.words
        if words[0] == "torchrun":
            words = words[words.index("fastokd") :]
        words, written = (words[:-2], words[-1]) if ">" in words else (words, None)
        arguments = small(words, smaller=page in SMALLER)
        if page in SMALLER and arguments[0] == "train" and "/" in words[2]:
            recipe(words[2])  # the network that the page names
        if arguments[0] == "train" and "--out" not in arguments and "--resume" not in arguments:
            # A page may show one recipe twice; a run is never overwritten.
            for earlier in (sandbox / "runs").glob(f"{arguments[1].replace('/', '-')}-seed*"):
                shutil.rmtree(earlier)
        with monkeypatch.context() as patch:
            if arguments[0] == "train":  # whose page takes seconds to draw
                patch.setattr("fastokd.report.page.report", lambda runs, **how: None)
            if any(word in MANY_RUNS for word in arguments):
                patch.setattr(importlib.import_module("fastokd.train"), "train", fake)
            capsys.readouterr()
            code = run_command(arguments)
            printed = capsys.readouterr()
            assert code == 0, f"{command.text}\n{printed.err}"
            if written is not None:
                (sandbox / written).write_text(printed.out)


OPTIONS = [
    command
    for command in ALL
    if command.words[0] == "fastokd" and command not in RUN and command.page not in ELSEWHERE
]


def test_the_options_of_those_that_are_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that only name a command, or need more than a test has: the reasons are NOT_RUN's."""
    shown: dict[tuple[str, ...], str] = {}
    for command in OPTIONS:
        verb = subcommand(command.words)
        if verb not in shown:
            assert run_command([*verb, "--help"]) == 0, command.text
            shown[verb] = capsys.readouterr().out
        for option in re.findall(r"--[a-z][a-z-]*", command.text):
            assert re.search(rf"{option}\b", shown[verb]), f"{command.page}: {command.text}"
    assert NOT_RUN.keys() <= {command.text for command in OPTIONS}, "a reason that nothing needs"


def test_what_other_programs_are_asked_is_there() -> None:
    """make's targets, pip's extras, python's modules and files; nothing else is in any page."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    for command in ALL:
        program, *words = command.words
        if program == "make":
            assert words[0] in targets, command
        elif program == "pip":
            # Installing needs a network; tests/test_packaging.py looks into the wheel.
            assert words[0] == "install", command
            for extra in re.findall(r"\[([\w,-]+)\]", command.text):
                assert all(f"\n{name} = [" in project for name in extra.split(",")), command
        elif program == "python":
            if words[0] == "-m":
                module = words[1]
                assert importlib.util.find_spec(module) is not None, command
            elif not words[0].endswith("/classify.py"):  # tests/student/test_deployment.py runs it
                assert (ROOT / words[0]).is_file(), command
        else:
            assert program in ("fastokd", "torchrun"), command


def test_pages_run_elsewhere_are_read_there() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()
        assert any(command.page == page for command in ALL)


def test_commands_are_found_where_pages_have_them() -> None:
    """Of a fence, an indented block, a sentence that is broken in two, and a table."""
    found = {page: [command.text for command in commands(page)] for page in pages()}
    assert "fastokd predict runs/first picture.png" in found["docs/start.md"]
    assert (
        "fastokd bench step okddip-branch/resnet32/cifar100 --reference"
        in (found["docs/benchmarks.md"])
    )
    assert "make proofs" in found["README.md"]
    assert "fastokd train ffsd/resnet32/cifar100 --data-root data" in found["docs/translation.md"]
    (photos,) = [c for c in commands("docs/imagenet.md") if "eval_resize=73" in c.text]
    assert photos.text.startswith("fastokd train okddip-branch/resnet18/imagenet")
    assert Command("", ("fastokd", "train", "RECIPE"), False) not in RUN
