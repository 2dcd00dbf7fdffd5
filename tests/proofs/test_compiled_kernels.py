"""Machine code of every kernel, for GPUs that aren't here: no spills, wide accesses, no atomics.

``python -m tests.proofs.test_compiled_kernels`` prints the tables of docs/kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest

from tests.proofs.kernel_cases import CASES, TARGET_CASES, mixture, target
from tests.proofs.offline import TARGETS, Facts, compiling_for, facts, skip_where_triton_spills
from tests.proofs.test_compiled_map_kernels import print_table

JOBS = [(name, target) for name, case in CASES.items() for target in case.targets]
Compiled = dict[tuple[str, str], "Future[list[Facts]]"]


def _facts(name: str, target: str) -> list[Facts]:
    return facts(CASES[name].launch, target)


def compile_all(jobs: list[tuple[str, str]]) -> tuple[ProcessPoolExecutor, Compiled]:
    # The interpreter's flag would make these kernels uncompilable.
    assert os.environ.get("TRITON_INTERPRET") != "1"
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    return pool, {job: pool.submit(_facts, *job) for job in jobs}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Of the jobs that this run of pytest asks for."""
    mine = [
        item for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())
    ]
    asked = [item.callspec.params for item in mine]
    pool, found = compile_all([(params["name"], params["target"]) for params in asked])
    yield found
    pool.shutdown(cancel_futures=True)


@pytest.mark.proof
@pytest.mark.parametrize(("name", "target"), JOBS)
def test_machine_code(name: str, target: str, compiled: Compiled) -> None:
    skip_where_triton_spills(target)
    case, kernels = CASES[name], compiled[name, target].result()
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.atomics == 0, kernel
        assert kernel.products == 0, kernel
        assert kernel.registers <= 255, kernel
    if case.rows is not None and case.rows <= 4:
        main = kernels[0]
        for accesses in ("loads", "stores"):
            width = main.width(accesses)
            assert width == 16 or (width == 8 and main.registers <= 128), main


@pytest.mark.proof
@pytest.mark.parametrize(
    ("launch", "count"),
    [
        (partial(mixture, 2, 1, 10, pitch=12), 2),
        (partial(target, "decoupled", 2, 10), 1),
        (partial(target, "correlation", 2, 10), 3),
    ],
)
def test_another_batch_does_not_recompile(launch: Callable[..., None], count: int) -> None:
    with compiling_for("sm_90") as kernels:
        for B in (1, 2, 16, 17, 256):
            launch(B=B)
    assert len(kernels) == 5 * count
    assert len({id(kernel) for kernel in kernels}) == count


def _table() -> None:
    pool, found = compile_all(JOBS)
    print(f"| launch | warps | registers on {', '.join(TARGETS)} | spills | loads | stores |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if name in TARGET_CASES:
            continue
        of = {target: found[name, target].result()[0] for target in case.targets}
        registers = ", ".join(str(of[t].registers) if t in of else "-" for t in TARGETS)
        warps, spills, loads, stores = (
            ", ".join(dict.fromkeys(str(fact(kernel)) for kernel in of.values()))
            for fact in (
                lambda kernel: kernel.warps,
                lambda kernel: kernel.spills,
                lambda kernel: f"{kernel.width('loads')} B",
                lambda kernel: f"{kernel.width('stores')} B",
            )
        )
        print(f"| {name} | {warps} | {registers} | {spills} | {loads} | {stores} |", flush=True)
    pool.shutdown()


if __name__ == "__main__":
    _table()
    print_table({name: case.launch for name, case in TARGET_CASES.items()})
