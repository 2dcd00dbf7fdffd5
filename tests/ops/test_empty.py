"""Tensors without elements have no memory: every op refuses them in a sentence, or has a value."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from tests.ops import wrong_calls
from tests.ops.empty_cases import CASES, assert_as_the_reference, outcome
from tests.ops.wrong_calls import CALLS, used

DIMENSIONS = ["S", "B", "C", "P", "D", "H", "N", "K", "WIDE", "MK"]


@pytest.mark.usefixtures("cpp_ops")
@pytest.mark.parametrize(("op", "dim"), CASES)
def test_without_one_dimension(op: str, dim: str) -> None:
    for impl in ("auto", "cpp"):
        assert_as_the_reference(op, dim, impl)


@pytest.mark.usefixtures("cpp_ops")
@pytest.mark.parametrize("names", DIMENSIONS)
@pytest.mark.parametrize("op", CALLS)
def test_an_operator_called_by_its_name_survives(
    op: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [names] if hasattr(wrong_calls, names) else names:
        monkeypatch.setattr(wrong_calls, name, 0)
    with suppress(RuntimeError, IndexError):
        used(getattr(torch.ops.fastokd, op)(*CALLS[op]()))


def test_peers_of_no_width_listen_to_all_alike() -> None:
    """The products of nothing are 0, which is the mean; nothing has a gradient."""
    total, logits, query, key = outcome("peers", "d", "torch")
    assert total.isfinite()
    assert logits.abs().sum() > 0
    assert (query.shape, key.shape) == ((2, 2, 0), (2, 2, 0))
