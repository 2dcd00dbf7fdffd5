"""The README's commands on a bare machine: `python3`, `python3-venv`, `make` and `g++` alone.

The machine's root is copied from this one's Debian packages: the essential ones, those four, and
what they depend on. It has no git, no HOME of anybody, no caches and no data sets; a user without
privileges runs the commands, and after the install there is no network. It takes about 15 GB.

    python3 tests/bare.py [--bind PATH]... [TARGET]...    (demo, test, proofs by default)

``--bind`` shows a file or folder of this machine there, read-only: a package mirror, say.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WANTED = ("python3", "python3-venv", "make", "g++", "ca-certificates")
# Made by the packages' scripts, so that no list of files has them.
CONFIGURED = (
    "alternatives",
    "passwd",
    "group",
    "nsswitch.conf",
    "hosts",
    "resolv.conf",
    "ssl/certs",
)
HOME = "/home/newcomer"
PROJECT = f"{HOME}/fastokd"
# pivot_root, and not chroot, in which no user namespace can be begun.
ENTER = r"""
set -e
root=$1 online=$2 binds=$3; shift 3
mount --rbind "$root" "$root"
while IFS= read -r path; do
    [ -z "$path" ] || { mount --bind "$path" "$root$path"; mount -o remount,bind,ro "$root$path"; }
done <<< "$binds"
for name in dev sys; do mount --rbind /$name "$root/$name"; done
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
cd "$root"
pivot_root . mnt
cd /
mnt/usr/bin/umount -l mnt
[ "$online" = yes ] || python3 -c "
import fcntl, socket, struct
up = struct.pack('16sh', b'lo', 1)  # SIOCSIFFLAGS, IFF_UP: processes of one machine find each other
fcntl.ioctl(socket.socket(), 0x8914, up)"
cd "$PROJECT"
exec unshare --user --map-user=1000 --map-group=1000 "$@"
"""


def main(words: list[str] | None = None) -> int:
    """Runs the targets; the exit code of the first that fails, or 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=["demo", "test", "proofs"])
    parser.add_argument("--bind", action="append", type=Path, default=[])
    parser.add_argument("--root", type=Path, help="where the root is made, or was, and left")
    given = parser.parse_args(words)
    for tool in ("dpkg-query", "unshare", "git"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: a bare machine is made on Debian or Ubuntu", file=sys.stderr)
            return 2
    if given.root is not None:
        return run(given.root, given.targets, given.bind)
    with tempfile.TemporaryDirectory(prefix="bare", dir="/var/tmp") as folder:
        return run(Path(folder), given.targets, given.bind)


def run(root: Path, targets: list[str], binds: list[Path]) -> int:
    """Makes the root in ``root`` and runs ``make install``, then the targets without a network."""
    if not (root / "usr").exists():
        populate(root, closure(WANTED))
    unpack(root)
    for path in binds:
        place = root / path.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if path.is_dir() else place.touch()
    for target in ("install", *targets):
        print(f"== make {target} ==", flush=True)
        code = enter(root, ["make", target], binds, online=target == "install")
        if code:
            print(f"make {target} fails on a bare machine ({code}): see above", file=sys.stderr)
            return code
    return 0


def closure(wanted: Iterable[str]) -> set[str]:
    """The essential packages, the wanted ones, and all that they depend on."""
    form = "${Package}\t${Essential}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", form], check=True, capture_output=True, text=True
    ).stdout
    needs: dict[str, list[list[str]]] = {}
    provider: dict[str, str] = {}
    left = list(wanted)
    for line in listed.splitlines():
        package, essential, depends, provides = line.split("\t")
        needs[package] = [_names(choice, "|") for choice in depends.split(",") if choice.strip()]
        provider |= dict.fromkeys(_names(provides, ","), package)
        if essential == "yes":
            left.append(package)
    found: set[str] = set()
    while left:
        name = left.pop()
        package = name if name in needs else provider.get(name, "")
        if package not in needs:
            raise SystemExit(f"the package {name} isn't installed here: apt install {name}")
        if package in found:
            continue
        found.add(package)
        for choices in needs[package]:
            there = [choice for choice in choices if choice in needs or choice in provider]
            left += there[:1] or choices[:1]
    return found


def _names(text: str, separator: str) -> list[str]:
    """Package names without versions and architectures."""
    words = (re.split(r"[\s:(]", part.strip())[0] for part in text.split(separator))
    return [word for word in words if word]


def populate(root: Path, packages: Iterable[str]) -> None:
    """Copies the packages' files into ``root``."""
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", name).is_symlink():
            (root / "usr" / name).mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(Path("usr", name))
    listed = subprocess.run(
        ["dpkg-query", "-L", *packages], check=True, capture_output=True, text=True
    ).stdout
    for line in sorted(set(listed.splitlines())):
        source = Path(line)
        place = root / line.lstrip("/")
        if not source.is_absolute() or not os.path.lexists(source) or os.path.lexists(place):
            continue
        if source.is_dir() and not source.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place, follow_symlinks=False)
    for link in Path("/usr/bin").iterdir():  # awk, c++ and others, which alternatives stand for
        name = link.name
        if link.is_symlink() and os.readlink(link) == f"/etc/alternatives/{name}":
            (root / "usr/bin" / name).symlink_to(f"/etc/alternatives/{name}")
    for name in CONFIGURED:
        source, place = Path("/etc", name), root / "etc" / name
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        elif source.exists() and not place.exists():
            shutil.copy2(source, place)
    for name in ("dev", "sys", "proc", "tmp", "mnt", HOME.lstrip("/"), PROJECT.lstrip("/")):
        (root / name).mkdir(parents=True, exist_ok=True)


def unpack(root: Path) -> None:
    """Puts the committed tree where the project lies there."""
    tree = subprocess.run(
        ["git", "-C", str(CHECKOUT), "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(tree)) as archive:
        archive.extractall(root / PROJECT.lstrip("/"))


def enter(root: Path, command: list[str], binds: list[Path], *, online: bool) -> int:
    """Runs a command in the project there, as a user without privileges; its exit code."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {
        **(kept if online else {}),
        **{"PATH": "/usr/sbin:/usr/bin", "HOME": HOME, "PROJECT": PROJECT},
    }
    spaces = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
    spaces += [] if online else ["--net"]
    arguments = [str(root), "yes" if online else "no", "\n".join(map(str, binds)), *command]
    line = ["unshare", *spaces, "bash", "-c", ENTER, "bash", *arguments]
    return subprocess.run(line, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
