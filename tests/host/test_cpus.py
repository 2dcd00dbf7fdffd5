"""The CPUs that a process may use, and what is set before torch is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastokd.host import cpus
from fastokd.host.cpus import SPIN_COUNT, WAITING, cpu_quota, said, share_of_cpus, usable_cpus

V1 = "32 31 0:29 {inside} {point} rw,relatime - cgroup cgroup rw,{controllers}\n"
V2 = "41 31 0:38 {inside} {point} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
CPU = "/sys/fs/cgroup/cpu,cpuacct"


def machine(root: Path, groups: str, mounts: str, limits: dict[str, str]) -> Path:
    """Files as the kernel shows them, below ``root``."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(
        "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n24 23 0:5 / /proc rw - proc proc rw\n" + mounts
    )
    for name, text in limits.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def first(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


ONE = V1.format(inside="/", point=CPU, controllers="cpu,cpuacct")
TWO = V2.format(inside="/", point="/sys/fs/cgroup")
GROUPS = "5:memory:/other\n4:cpu,cpuacct:/a/b\n0::/\n"
CASES = {
    "no cgroups": ("", "", {}, None),
    "version 1": (GROUPS, ONE, first(f"{CPU}/a/b", 150_000), 1.5),
    "version 1, no limit": (GROUPS, ONE, first(f"{CPU}/a/b", -1), None),
    "version 1, the parent's": (
        GROUPS,
        ONE,
        first(f"{CPU}/a/b", 400_000) | first(f"{CPU}/a", 100_000, 50_000) | first(CPU, -1),
        2.0,
    ),
    "version 1, a container's own mount": (
        "4:cpuacct,cpu:/docker/0123\n",
        V1.format(inside="/docker/0123", point=CPU, controllers="cpuacct,cpu"),
        first(CPU, 50_000),
        0.5,
    ),
    "version 1, a group outside of the mount": (
        "4:cpu,cpuacct:/elsewhere\n",
        V1.format(inside="/docker/0123", point=CPU, controllers="cpu,cpuacct"),
        first(CPU, 50_000),
        0.5,
    ),
    "version 1, a quota of another controller": (
        "7:cpuset:/a\n",
        V1.format(inside="/", point="/sys/fs/cgroup/cpuset", controllers="cpuset"),
        first("/sys/fs/cgroup/cpuset/a", 50_000),
        None,
    ),
    "version 2": (
        "0::/user.slice/a.scope\n",
        TWO,
        {"/sys/fs/cgroup/user.slice/a.scope/cpu.max": "250000 100000"},
        2.5,
    ),
    "version 2, no limit": ("0::/\n", TWO, {"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
    "version 2, the grandparent's": (
        "0::/a/b/c\n",
        TWO,
        {
            "/sys/fs/cgroup/a/cpu.max": "100000 100000",
            "/sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "/sys/fs/cgroup/a/b/c/cpu.max": "800000 100000",
        },
        1.0,
    ),
    "version 2, a namespace's own root": (
        "0::/../../outside\n",
        TWO,
        {"/sys/fs/cgroup/cpu.max": "300000 100000"},
        3.0,
    ),
    "both versions": (
        "4:cpu:/a\n0::/a\n",
        V1.format(inside="/", point="/sys/fs/cgroup/cpu", controllers="cpu")
        + V2.format(inside="/", point="/sys/fs/cgroup/unified"),
        first("/sys/fs/cgroup/cpu/a", 200_000) | {"/sys/fs/cgroup/unified/a/cpu.max": "max 100000"},
        2.0,
    ),
    "a space in a path": (
        "0::/a\n",
        V2.format(inside="/", point=r"/my\040cgroups"),
        {"/my cgroups/a/cpu.max": "100000 100000"},
        1.0,
    ),
    "damaged": ("0::/a\n", TWO, {"/sys/fs/cgroup/a/cpu.max": "much"}, None),
    "a period of nothing": ("0::/a\n", TWO, {"/sys/fs/cgroup/a/cpu.max": "1000 0"}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_quota_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, mounts, limits, quota = CASES[name]
    root = machine(tmp_path, groups, mounts, limits)
    assert cpu_quota(root) == quota
    monkeypatch.setattr(cpus, "affinity", lambda: set(range(64)))
    wanted = {None: 64, 0.5: 1, 1.5: 2, 2.5: 3}
    assert usable_cpus(root) == wanted.get(quota, quota)
    monkeypatch.setattr(cpus, "affinity", lambda: {7})
    assert usable_cpus(root) == 1


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_ranks_of_one_machine_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 8)
    for ranks, share in (("", 8), ("x", 8), ("0", 8), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert share_of_cpus() == share
    assert "16 ranks share them" in said()


def begun(before: str = "", **environment: str) -> list[str]:
    """In a new process: how threads wait, how many of them there are, and what is said of them."""
    program = (
        f"{before}\nimport fastokd, os, torch\nfrom fastokd.host import cpus\nfastokd.ops\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), torch.get_num_threads(), cpus.said(), sep='\\n')"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*WAITING, *cpus.COUNTING, "LOCAL_WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_what_is_set_before_torch_is_loaded() -> None:
    spin, threads, line = begun()
    assert spin == str(SPIN_COUNT)
    assert int(threads) <= usable_cpus()
    assert re.fullmatch(
        rf"{threads} threads? on \d+ CPUs? \((a quota of [\d.]+, )?spin count {SPIN_COUNT}\); .+",
        line,
    )


def test_what_a_user_set_is_kept() -> None:
    passive = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    assert begun(**passive) == [
        "None",
        "1",
        f"1 thread on {usable_cpus()} CPUs (OMP_NUM_THREADS is 1, 2 ranks share them, "
        "OMP_WAIT_POLICY is passive)".replace("1 CPUs", "1 CPU"),
    ]


@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_a_number_of_threads_that_openmp_cant_read_isnt_set(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in cpus.COUNTING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert "OMP_NUM_THREADS" not in said()
    found = torch.get_num_threads()
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 1)
    try:
        torch.set_num_threads(2)
        cpus.settle_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(found)
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert "OMP_NUM_THREADS is 4,2" in said()


def test_a_torch_that_is_loaded_already_is_left_as_it_is() -> None:
    narrow = "import os, torch; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])"
    spin, threads, line = begun(narrow)
    assert (spin, threads) == ("None", "1")
    assert "torch was imported before fastokd" in line


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (None, ")"),
        (0.2, "; nothing else runs on them"),
        (1.9, "; 1.9 other threads run on them"),
        (7.2, "; the machine is shared: 7.2 other threads slow this program down"),
    ],
)
def test_it_is_said_whether_others_use_the_cpus(
    others: float | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: torch.get_num_threads() + 2)
    monkeypatch.setattr(cpus, "_others", lambda: others)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert said().endswith(says)


def test_work_of_this_process_is_not_others() -> None:
    found = cpus._others()
    assert found is not None
    assert 0 <= found <= len(os.sched_getaffinity(0)) + 1
