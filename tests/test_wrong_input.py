"""Whatever a user gets wrong is one sentence that names it and says what to do; nothing is left.

The command lines stand in ``wrong_input.txt``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastokd import cli
from tests.wrong_place import RESUMED, make_place

HERE = Path(__file__).parent
ROWS = [
    line
    for line in (HERE / "wrong_input.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made once: that every row leaves it as it was is part of the test."""
    made = make_place(tmp_path_factory.mktemp("wrong"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


def left_in(place: Path) -> dict[str, tuple[int, int]]:
    """Every path; of files how large they are, and when they were written."""
    found = {}
    for path in place.rglob("*"):
        status = path.lstat()
        is_file = path.is_file() or path.is_symlink()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if is_file else (0, 0)
    return found


def test_there_are_enough() -> None:
    """At least 80 were promised, of every command."""
    words = [shlex.split(row.split(" | ")[0]) for row in ROWS]
    assert len(ROWS) >= 80
    commands = "bench compare convert diff doctor evaluate export list model-info plan predict "
    commands += "prepare report reproduce runs clean watch train"
    assert {word[0] for word in words} >= set(commands.split())


@pytest.mark.usefixtures("all_digits")
@pytest.mark.parametrize("row", ROWS, ids=[row.split(" | ")[0][:100] for row in ROWS])
def test_wrong_input_is_one_sentence(
    row: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *says = row.split(" | ")
    command = command.replace("RECIPE", "okddip-branch/resnet8/digits").replace("RESUME", RESUMED)
    before = left_in(place)
    code = cli.run_command(shlex.split(command))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("fastokd: ")
    assert printed.err.count("\n") == 1
    for words in says:
        assert words in printed.err
    assert "Traceback" not in printed.out + printed.err
    assert left_in(place) == before
