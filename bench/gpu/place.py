"""The environment of the sections: an importable checkout and a folder for results."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Folders that pyproject maps into the package.
MAPPED = ("kernels", "csrc")
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"


class Place:
    """A temporary folder: ``tree``, the checkout with the complete package; ``work``, for results.

    Compiled Triton kernels are kept between calls, in a folder of the user.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-first-"))
        self.tree = self.folder / "tree"
        self.work = self.folder / "work"
        self.work.mkdir()
        self.tree.mkdir()
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name not in ("fastokd", "build", "dist"):
                (self.tree / entry.name).symlink_to(entry)
        package = self.tree / "fastokd"
        package.mkdir()
        for entry in (ROOT / "fastokd").iterdir():
            if entry.name not in (*MAPPED, "__pycache__"):
                (package / entry.name).symlink_to(entry)
        for name in MAPPED:
            (package / name).symlink_to(ROOT / name)

    def environment(self) -> dict[str, str]:
        """The environment variables of a section's processes."""
        kernels = Path(tempfile.gettempdir()) / f"fastokd-triton-{os.getuid()}"
        kernels.mkdir(mode=0o700, exist_ok=True)
        found = {
            **os.environ,
            "PYTHONPATH": str(self.tree),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TMPDIR": str(self.work),
        }
        found.setdefault("TRITON_CACHE_DIR", str(kernels))
        return found

    def remove(self) -> None:
        """Removes the folder; the compiled kernels are elsewhere and stay."""
        shutil.rmtree(self.folder, ignore_errors=True)


def card() -> dict[str, Any] | None:
    """The driver's description of the first GPU; None without a GPU."""
    said = _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    if not said:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))


def sources() -> dict[str, Any]:
    """The commit, if git knows it, and a digest of the sources."""
    digest = hashlib.sha256()
    for folder in ("fastokd", "kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return {
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or None,
        "sources_sha256": digest.hexdigest(),
    }


def compilers() -> dict[str, Any]:
    """The compilers and headers that Triton and Inductor need."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return {
        **{name: shutil.which(name) for name in ("cc", "gcc", "g++", "nvcc")},
        "Python.h": str(header) if header.exists() else None,
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
