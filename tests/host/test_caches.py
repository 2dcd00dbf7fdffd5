"""Caches are never needed: where a folder can't be written, another takes its place."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastokd.host import caches
from fastokd.host.caches import OTHERS, cache_root, cache_roots, settle

# Nobody can write there, root included.
NO_PLACE = "/proc/1/nowhere"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a temporary folder beside it, of their own."""
    for name in ("FASTOKD_CACHE", "XDG_CACHE_HOME", *OTHERS):
        monkeypatch.setenv(name, "")  # and so what settle() sets is put back
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    caches._refusal.cache_clear()
    caches._say.cache_clear()
    return tmp_path


def test_the_first_folder_that_can_be_written_is_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = place / "tmp" / f"fastokd-{os.getuid()}"
    assert cache_root() == place / "home/.cache/fastokd"
    assert sorted(place.rglob("*")) == [place / "home", place / "tmp"]  # looking leaves nothing
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "xdg"))
    assert cache_root() == place / "xdg/fastokd"
    monkeypatch.setenv("FASTOKD_CACHE", str(place / "own"))
    assert cache_root() == place / "own"
    assert capsys.readouterr().err == ""
    for refused in (NO_PLACE, "file/inside"):
        (place / "file").touch()
        monkeypatch.setenv("FASTOKD_CACHE", str(place / refused))
        assert cache_root() == cache_root() == place / "xdg/fastokd"
        said = capsys.readouterr().err
        assert said.count("caches can't be written to") == 1
        assert str(place / refused) in said
        assert "set FASTOKD_CACHE" in said
    monkeypatch.setenv("XDG_CACHE_HOME", NO_PLACE)
    monkeypatch.setenv("HOME", NO_PLACE)
    assert cache_root() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert cache_roots()[0] == place / "file/inside"  # something may have been cached there


@pytest.mark.parametrize("kind", ["open to others", "open to a group", "a link", "absent"])
def test_no_library_is_loaded_from_a_temporary_folder_of_others(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", NO_PLACE)
    folder = place / "tmp" / f"fastokd-{os.getuid()}"
    if kind.startswith("open"):
        folder.mkdir()
        folder.chmod(0o770 if kind.endswith("a group") else 0o707)
    elif kind == "a link":
        folder.symlink_to(place / "home")
    else:
        monkeypatch.setattr(tempfile, "tempdir", NO_PLACE)
    with pytest.raises(OSError, match="Not a directory"):
        (cache_root() / "cpp").mkdir(parents=True)
    assert "nothing is kept" in capsys.readouterr().err


def test_other_libraries_are_given_a_folder_where_theirs_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    assert not any(os.environ[name] for name in OTHERS)
    monkeypatch.setenv("HOME", NO_PLACE)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", NO_PLACE)
    settle()
    folders = {Path(os.environ[name]) for name in OTHERS}
    assert len(folders) == len(OTHERS)
    assert {folder.parent for folder in folders} == {place / "tmp" / f"fastokd-{os.getuid()}"}


def test_nothing_needs_a_cache(tmp_path: Path) -> None:
    """A run and its report, with neither a home nor a folder for caches."""
    (tmp_path / f"fastokd-{os.getuid()}").touch()
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "FASTOKD_CACHE", *OTHERS), NO_PLACE)
    program = (
        "import sys, fastokd\n"
        "one = fastokd.recipe('okddip-branch/resnet8/digits', epochs=1, students=2, batch_size=250)\n"
        "fastokd.train(one, out=sys.argv[1], max_steps=1, device='cpu', quiet=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env={**os.environ, **nowhere, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing is kept") == 1
    assert (tmp_path / "run/student.safetensors").exists()
    assert (tmp_path / "run/report.html").exists()
