"""The CPUs that this process may use, and how torch's threads wait on them.

This is the one place that counts CPUs: affinity and a container's quota decide, not the machine.
Nothing here imports torch: :func:`settle` must set its environment first.
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
# How often a thread of libgomp looks for work before it sleeps. libgomp's own 300,000 take a core
# from another program after each of a step's thousands of parallel regions; with none a thread is
# woken in each of them. bench/bench_two_programs.py measures what lies between.
SPIN_COUNT = 1500
# Either of these says how threads wait, OpenMP's own setting or libgomp's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Either of these says how many there are.
COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Seconds over which the machine's other threads are counted.
LOOK = 0.2


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs for the threads of this process: those of its affinity, or of its cgroups' quota where
    that is less, rounded up; at least 1. ``root``: where ``/proc`` and ``/sys`` are.
    """
    quota = cpu_quota(root)
    allowed = len(affinity())
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def share_of_cpus() -> int:
    """:func:`usable_cpus` for one of the ranks that torchrun started on this machine; at least 1."""
    return max(1, usable_cpus() // ranks_here())


def ranks_here() -> int:
    """Processes of this run on this machine: as torchrun says, 1 where it wasn't torchrun."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(ranks)) if ranks.isdecimal() else 1


def affinity() -> set[int]:
    """The CPUs that the scheduler may choose from."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroups of this process give it a second, the tightest of a group and its
    ancestors; None where there is no limit, or none that can be read."""
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
    """Of one mounted hierarchy that limits CPUs: this process's group and its ancestors."""
    fields, _, rest = mount.partition(" - ")
    kind, *_, options = rest.split() or [""]
    inside, point = (_unescaped(field) for field in fields.split()[3:5])
    for group in groups:
        _, controllers, path = group.split(":", 2)
        first = kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")
        second = kind == "cgroup2" and not controllers
        if not (first or second):
            continue
        # A container sees its own group as the mount's root, and its path as the host's.
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
    """The quota of one group over its period, of version 2 or 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        limit = float(quota) / float(period)  # "max" is no number
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None


def _unescaped(field: str) -> str:
    r"""A path as mountinfo has it: a space is ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def settle() -> None:
    """Sets how torch's threads wait, for this process and its children. Leaves what the user set.

    Must run before torch is imported: libgomp reads its environment when it is loaded.
    """
    if not _set_by_user(WAITING) and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def settle_threads() -> None:
    """Lowers torch's threads to this process's share of the CPUs. Leaves what the user set."""
    if not _threads_set() and torch.get_num_threads() > share_of_cpus():
        torch.set_num_threads(share_of_cpus())


def _set_by_user(names: tuple[str, ...]) -> list[str]:
    """Which of these variables are set, each in words."""
    return [f"{name} is {os.environ[name]}" for name in names if os.environ.get(name)]


def _threads_set() -> list[str]:
    """:func:`_set_by_user` of the threads; what OpenMP can't read is as if it weren't set."""
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
    """What was chosen, why, and who else is there, in a line: ``2 threads on 2 CPUs (spin count
    1500); nothing else runs on them``. Takes 0.2 s."""
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
    if others is None or ranks > 1:  # the other ranks are at work, too
        return line
    if others < 0.5:
        return f"{line}; nothing else runs on them"
    if others + threads < usable + 0.5:
        return f"{line}; {others:.1f} other threads run on them"
    return f"{line}; the machine is shared: {others:.1f} other threads slow this program down"


def _others() -> float | None:
    """Threads of other programs that keep this process's CPUs busy; None where the system doesn't
    say."""
    before = _work()
    time.sleep(LOOK)
    after = _work()
    if before is None or after is None:
        return None
    (busy_then, mine_then, then), (busy, mine, now) = before, after
    return max(0.0, busy - busy_then - (mine - mine_then)) / (now - then)


def _work() -> tuple[float, float, float] | None:
    """Seconds of work that this process's CPUs have done, those for itself, and the time."""
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    mine = {f"cpu{number}" for number in affinity()}
    # user, nice, system, irq and softirq: neither idle nor waiting for a disk.
    ticks = sum(int(row[i]) for row in rows if row and row[0] in mine for i in (1, 2, 3, 6, 7))
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()
