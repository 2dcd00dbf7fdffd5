"""The memory available to this process."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes available to this process: the smaller of the machine's and its container's; None if
    neither can be read."""
    lines = lines_of("/proc/meminfo")
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file "),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file "),
    ):
        most, taken = (lines_of(f"/sys/fs/cgroup/{name}")[:1] for name in (limit, used))
        if most and taken and most[0].isdecimal():
            stat = lines_of(f"/sys/fs/cgroup/{Path(limit).parent}/memory.stat")
            kept = sum(int(line.split()[1]) for line in stat if line.startswith(cache))
            found.append(max(0, int(most[0]) - int(taken[0]) + kept))
    return min(found, default=None)


def lines_of(path: str) -> list[str]:
    """The lines of a file; none if it can't be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def mib(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 2**20:,.0f} MiB"
