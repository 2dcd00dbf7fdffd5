"""The CPUs that this process may use, and how torch's threads wait.

All CPUs are counted here, from the process's affinity and its container's quota. This module is
imported before torch: :func:`settle` must set the environment first.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastokd.known import Later

torch = Later("torch")
# How often an idle thread of libgomp checks for work before it sleeps. With libgomp's default of
# 300,000, idle threads occupy cores that another program needs; with 0, each parallel region must
# wake its threads. bench/bench_two_programs.py measures values between them.
SPIN_COUNT = 1500
# The variables that set how threads wait: OpenMP's and libgomp's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# The variables that set the number of threads.
COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Seconds over which other programs' CPU time is measured.
LOOK = 0.2


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs for this process: the smaller of its affinity and its cgroups' quota, rounded up; at
    least 1. ``root``: the folder that holds ``/proc`` and ``/sys``.
    """
    quota = cpu_quota(root)
    allowed = len(affinity())
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def share_of_cpus() -> int:
    """:func:`usable_cpus` divided by the ranks that torchrun started on this machine; at least 1."""
    return max(1, usable_cpus() // ranks_here())


def ranks_here() -> int:
    """Processes of this run on this machine, from torchrun's environment; 1 without torchrun."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(ranks)) if ranks.isdecimal() else 1


def affinity() -> set[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota of this process's cgroups, the smallest of a group and its ancestors; None
    without a limit, or if none can be read."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return None
    limits = [
        limit
        for mount in mounts
        for folder in _folders(mount, groups, root)
        if (limit := _limit(folder)) is not None
    ]
    return min(limits, default=None)


def _folders(mount: str, groups: list[str], root: Path) -> Iterator[Path]:
    """This process's group and its ancestors in one mounted hierarchy that limits CPUs."""
    fields, _, rest = mount.partition(" - ")
    kind, *_, options = rest.split() or [""]
    inside, point = (_unescaped(field) for field in fields.split()[3:5])
    for group in groups:
        _, controllers, path = group.split(":", 2)
        first = kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")
        second = kind == "cgroup2" and not controllers
        if not (first or second):
            continue
        # In a container the mount's root is its own group, while the path is the host's.
        below = path.removeprefix(inside.rstrip("/")) if path.startswith(inside) else "/"
        top = root / point.lstrip("/")
        folder = top / below.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():
            folder = top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _limit(folder: Path) -> float | None:
    """Quota over period of one group, of cgroup version 2 or 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        limit = float(quota) / float(period)  # "max" raises ValueError
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None


def _unescaped(field: str) -> str:
    r"""Decodes a path of mountinfo, where a space is ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def settle() -> None:
    """Sets how torch's threads wait, for this process and its children, unless the user has set it.

    Must run before torch is imported: libgomp reads its environment when it is loaded.
    """
    if not _set_by_user(WAITING) and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def settle_threads() -> None:
    """Lowers torch's threads to this process's share of the CPUs, unless the user has set them.

    ``fastokd.ops`` calls it when it is imported: every part of fastokd that uses torch imports it.
    """
    if not _threads_set() and torch.get_num_threads() > share_of_cpus():
        torch.set_num_threads(share_of_cpus())


def _set_by_user(names: tuple[str, ...]) -> list[str]:
    """``NAME is VALUE`` for each of these variables that is set."""
    return [f"{name} is {os.environ[name]}" for name in names if os.environ.get(name)]


def _threads_set() -> list[str]:
    """:func:`_set_by_user` for the number of threads; values that OpenMP can't parse don't count."""
    return _set_by_user(
        tuple(n for n in COUNTING if re.match(r"\s*0*[1-9]\d*\s*(,|$)", os.environ.get(n, "")))
    )


def waiting() -> str:
    """How torch's threads wait for the next parallel region."""
    if os.environ.get("GOMP_SPINCOUNT") == str(SPIN_COUNT):
        return f"spin count {SPIN_COUNT}"
    found = _set_by_user(WAITING)
    return ", ".join(found) or "torch was imported before fastokd, so that GOMP_SPINCOUNT is unset"


def said() -> str:
    """One line about threads, the reason for their number and other load: ``2 threads on 2 CPUs
    (spin count 1500); nothing else runs on them``. Takes 0.2 s."""
    usable, ranks, quota = usable_cpus(), ranks_here(), cpu_quota()
    threads = torch.get_num_threads()
    reasons = _threads_set()
    if quota is not None and math.ceil(quota) <= usable:
        reasons.append(f"a quota of {quota:g}")
    if ranks > 1:
        reasons.append(f"{ranks} ranks share them")
    reasons.append(waiting())
    line = f"{threads} thread{'s' * (threads != 1)} on {usable} CPU{'s' * (usable != 1)}"
    line += f" ({', '.join(reasons)})"
    others = _others()
    if others is None or ranks > 1:  # the other ranks are counted as other programs
        return line
    if others < 0.5:
        return f"{line}; nothing else runs on them"
    if others + threads < usable + 0.5:
        return f"{line}; {others:.1f} other threads run on them"
    return f"{line}; the machine is shared: {others:.1f} other threads slow this program down"


def _others() -> float | None:
    """Threads of other programs that run on this process's CPUs; None if ``/proc/stat`` can't be
    read."""
    before = _work()
    time.sleep(LOOK)
    after = _work()
    if before is None or after is None:
        return None
    (busy_then, mine_then, then), (busy, mine, now) = before, after
    return max(0.0, busy - busy_then - (mine - mine_then)) / (now - then)


def _work() -> tuple[float, float, float] | None:
    """Busy seconds of this process's CPUs, CPU seconds of this process, and the time."""
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    mine = {f"cpu{number}" for number in affinity()}
    # user, nice, system, irq and softirq: neither idle nor waiting for a disk.
    ticks = sum(int(row[i]) for row in rows if row and row[0] in mine for i in (1, 2, 3, 6, 7))
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()
