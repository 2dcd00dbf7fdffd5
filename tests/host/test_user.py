"""A user whom the machine doesn't know, as in a container that is started with a number."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from fastokd.host.user import make_known


def unknown(uid: int) -> pwd.struct_passwd:
    raise KeyError(uid)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No name, no home; the folder for temporary files is the test's."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"fastokd-{os.getuid()}"


def test_it_gets_a_name_and_a_home_of_its_own(nobody: Path) -> None:
    for _ in range(2):
        make_known()
        assert os.environ["LOGNAME"] == f"uid{os.getuid()}"
        assert Path.home() == nobody
        assert nobody.stat().st_mode & 0o777 == 0o700
        del os.environ["HOME"]


def test_a_folder_that_another_may_write_is_no_home(nobody: Path) -> None:
    nobody.mkdir()
    nobody.chmod(0o777)
    make_known()
    assert Path.home() != nobody
    assert Path.home().stat().st_mode & 0o777 == 0o700


def test_a_known_user_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("LOGNAME", "somebody")
    make_known()
    assert (os.environ["HOME"], os.environ["LOGNAME"]) == ("/home/somebody", "somebody")
