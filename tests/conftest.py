"""What tests share: the goldens, and the rule that fills a network's state (goldens/README.md)."""

from __future__ import annotations

import fastokd  # noqa: F401  # isort: skip  (before torch, as in a program)

import gc
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastokd.data.sets import digits
from fastokd.data.sets.digits import digits_indices
from fastokd.measured.measure import measure
from fastokd.report import page
from fastokd.report.plots import draw_all

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> dict[str, Tensor]:
    """The numeric arrays of one golden file as tensors."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fi"}


def golden_names(name: str, array: str) -> list[str]:
    """An array of strings of one golden file."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return [str(value) for value in arrays[array]]


def fill_value(key: str, shape: torch.Size) -> Tensor:
    """One entry by the rule: ``key`` is the published key, prefix included."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    r = torch.randn(shape, generator=generator, dtype=torch.float64)
    if key.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith("running_mean"):
        return 0.1 * r
    if r.dim() >= 2:
        return r * (2 / r[0].numel()) ** 0.5
    return 1 + 0.1 * r if key.endswith("weight") else 0.1 * r


def step_variant(key: str, value: Tensor) -> Tensor:
    """The milder start of the step goldens; ``key`` is without the prefix."""
    if value.dim() == 1 and key.endswith("weight"):
        return value * 0.5
    named = "classifier" in key or key.startswith("fc") or key.endswith("fc.weight")
    return value * 0.3 if value.dim() == 2 and named else value


@torch.no_grad()
def fill(state: Mapping[str, Tensor], published: Mapping[str, str] | None = None) -> None:
    """Fills a state dict in place; ``published`` maps its keys to the published ones."""
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
        else:
            value.copy_(fill_value(published[key] if published else key, value.shape))


class _AtOnce:
    """Names a failed test when it fails, since a run that is stopped never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and said is not None:
            last = (report.longreprtext.strip().splitlines() or [""])[-1]
            said.write_line(f"\nfailed: {report.nodeid}: {last}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(config))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What earlier files have left isn't looked through by each collection: a third of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _without_figures() -> Iterator[None]:
    """The page of a run has no figures and measures nothing, which takes longer than to train the tests' runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw_all", lambda pools: {})
        patch.setattr(page, "measure", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def figures() -> Iterator[None]:
    """From here to the end of the file the pages have their figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw_all", draw_all)
        patch.setattr(page, "measure", measure)
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_digits() -> Iterator[None]:
    """The digits have 100 images to train, 50 to validate and 100 to test, of each class 9 to 11 to train
    and as many of each else: a fifth of the time."""
    few, (_, labels_N) = digits.digits_indices(), digits.digits_pixels()
    counts = {"train": (9, 10, 11, 9, 10, 11, 9, 10, 11, 10), "val": (5,) * 10, "test": (10,) * 10}
    for split, count_C in counts.items():
        of_N = labels_N[few[split]]
        first = torch.cat([(of_N == c).nonzero()[:n, 0] for c, n in enumerate(count_C)])
        few[split] = few[split][first.sort().values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "digits_indices", lambda: few)
        yield


@pytest.fixture(scope="module")
def all_digits() -> Iterator[None]:
    """From here to the end of the file the digits have all their images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "digits_indices", digits_indices)
        yield


@pytest.fixture
def own_kernel_selection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``--deterministic`` sets for a whole process is set back after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture(scope="session")
def cpp_ops() -> None:
    """The C++ ops, built. Without a compiler there are none: a machine with g++ runs these tests."""
    from fastokd.ops import cpp

    if cpp.find_compiler() is None:
        pytest.skip("no C++ compiler here: install g++")
    reason = cpp.ensure_built()
    assert reason is None, reason
