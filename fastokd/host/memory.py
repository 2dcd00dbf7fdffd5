"""The memory that this process may still take."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that this process may still take: of the machine or, where that is less, of its
    container; None where nobody says."""
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
    """Of a file such as the kernel's; none where it can't be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def mib(size: int) -> str:
    """A number of bytes, for a person."""
    return f"{size / 2**20:,.0f} MiB"
