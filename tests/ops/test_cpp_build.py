"""The C++ build: cached by what it depends on, one builder at a time, readable where it fails."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastokd.host import caches
from fastokd.ops import cpp
from fastokd.ops.dispatch import unavailable

CPU = torch.device("cpu")
Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A compiler that writes a few bytes, and a build of two files in a cache of its own.

    It appends each call to ``calls``, and answers --version with $FAKE_VERSION.
    """

    def make(body: str = "") -> None:
        compiler = tmp_path / "fake++"
        compiler.write_text(
            f"#!{sys.executable}\n"
            "import os, sys, time\n"
            "if '--version' in sys.argv:\n"
            "    sys.exit(print(os.environ.get('FAKE_VERSION', '1')))\n"
            f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"{body}\n"
            "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('object')\n"
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        cpp._version.cache_clear()

    csrc = tmp_path / "csrc"
    csrc.mkdir()
    for name in ("x.cpp", "x_kernel.cpp", "x_kernel.h"):
        (csrc / name).write_text(f"// {name}\n")
    monkeypatch.setenv("FASTOKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        cpp, "sources", lambda: sorted(p for p in csrc.iterdir() if p.suffix in (".cpp", ".h"))
    )
    monkeypatch.setattr(cpp, "_library", None)
    monkeypatch.setattr(cpp, "_reason", None)
    make()
    yield make
    cpp._version.cache_clear()


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_kernels_are_compiled_for_each_instruction_set(fake: Fake, tmp_path: Path) -> None:
    path = cpp.build()
    assert path.read_text() == "object"
    compiled = calls(tmp_path)
    assert len(compiled) == 1 + len(cpp.CAPABILITIES) + 1  # x, x_kernel, the link
    for name, flags in cpp.CAPABILITIES.items():
        (unit,) = (
            call for call in compiled if f"x_kernel.{name}.o" in call and " -c " in f" {call} "
        )
        assert f"-DFASTOKD_CAPABILITY={name}" in unit
        assert all(flag in unit for flag in flags)
    assert not any("-march=native" in call or "-ffast-math" in call for call in compiled)
    assert not list(path.parent.glob("build-*"))


def test_what_is_cached_is_not_built_again(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = [cpp.build()]
    count = len(calls(tmp_path))
    assert cpp.build() == built[0]
    assert len(calls(tmp_path)) == count

    def rebuilt() -> bool:
        cpp._version.cache_clear()
        built.append(cpp.build())
        return built[-1] not in built[:-1]

    (tmp_path / "csrc" / "x_kernel.h").write_text("// changed\n")
    assert rebuilt()
    monkeypatch.setenv("FAKE_VERSION", "2")
    assert rebuilt()
    monkeypatch.setattr(torch, "__version__", "99")
    assert rebuilt()
    monkeypatch.setattr(cpp, "KERNEL", (*cpp.KERNEL, "-g"))
    assert rebuilt()


def test_a_library_serves_where_no_compiler_is(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was built with one."""
    path = cpp.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert cpp.build() == path
    assert cpp._cached() == path


def test_no_compiler_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in str(cpp.ensure_built())
    assert "no C++ compiler" in str(unavailable("cpp", CPU))


def test_an_op_never_builds(fake: Fake, tmp_path: Path) -> None:
    assert "run `python -m fastokd.ops`" in str(unavailable("cpp", CPU))
    assert calls(tmp_path) == []


def test_what_the_compiler_says_is_passed_on(fake: Fake, tmp_path: Path) -> None:
    fake("sys.exit('x.cpp:3: error: expected a semicolon')")
    assert "x.cpp:3: error: expected a semicolon" in str(cpp.ensure_built())
    assert not list((tmp_path / "cache").glob("*/ops-*"))
    assert not list((tmp_path / "cache").glob("*/build-*"))


def test_a_compiler_that_does_not_run_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert "doesn't answer --version" in str(cpp.ensure_built())


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTOKD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = cpp.build()
    assert path.is_relative_to(tmp_path / f"fastokd-{os.getuid()}")
    assert cpp.build() == path
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    assert "/dev/null" in str(cpp.ensure_built())


def test_a_damaged_library_is_built_again(fake: Fake, tmp_path: Path) -> None:
    """Loading half a library may end the process."""
    path = cpp.build()
    path.write_text("obj")
    assert "run `python -m fastokd.ops`" in str(unavailable("cpp", CPU))
    assert cpp.build().read_text() == "object"


def test_a_library_in_a_cache_that_cannot_be_written_is_used(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image whose files are read-only."""
    path = cpp.build()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(caches, "_refusal", lambda folder: "Read-only file system")
    assert cpp.build() == path


def test_one_builds_and_the_others_wait(fake: Fake, tmp_path: Path) -> None:
    fake("time.sleep(0.2)")
    builders = [threading.Thread(target=cpp.build) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(calls(tmp_path)) == 2 + len(cpp.CAPABILITIES)


def test_the_lock_dies_with_its_holder(fake: Fake, tmp_path: Path) -> None:
    """A builder is killed in the middle: the next takes over and clears up what it left."""
    folder = cpp.cache_root() / cpp._folder_name()
    (folder / "build-left").mkdir(parents=True)
    (folder / "build-left" / "x.o").write_text("half")
    script = (
        "import fcntl, sys, time\n"
        f"lock = open({str(folder / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        builder = threading.Thread(target=cpp.build)
        builder.start()
        time.sleep(0.2)
        assert calls(tmp_path) == []
        holder.kill()
    builder.join(timeout=30)
    assert not builder.is_alive()
    assert list(folder.glob("ops-*.so"))
    assert not list(folder.glob("build-*"))
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.usefixtures("cpp_ops")
class TestLibrary:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("default", r"C\+\+ ops: \S+\.so, default"),
            ("neon", r"torch' serves .* FASTOKD_CPU_CAPABILITY is 'neon': this CPU runs default"),
        ],
    )
    def test_the_command_and_the_variable(self, name: str, says: str) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "fastokd.ops"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "FASTOKD_CPU_CAPABILITY": name},
        )
        assert run.returncode == (name == "neon"), run.stderr
        assert re.search(says, run.stdout)

    def test_kernels_share_nothing(self) -> None:
        """Beside its kernels a unit defines nothing that the linker could take for another's."""
        compiler = cpp.find_compiler()
        nm = shutil.which("nm")
        if compiler is None or nm is None:
            pytest.skip("no nm here")
        for source in cpp.sources():
            if not source.name.endswith("_kernel.cpp"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                unit = f"{folder}/unit.o"
                flags = [*cpp.COMMON, *cpp.KERNEL, "-O0", "-DFASTOKD_CAPABILITY=default"]
                subprocess.run([compiler, *flags, "-c", source, "-o", unit], check=True)
                symbols = subprocess.run(
                    [nm, "-C", unit], capture_output=True, text=True, check=True
                )
            shared = [s for s in symbols.stdout.splitlines() if re.search(r" [WVu] ", s)]
            assert shared == [], source.name
            included = re.findall(r"#include [<\"](.+)[>\"]", source.read_text())
            assert all(name.endswith(".h") for name in included), source.name
