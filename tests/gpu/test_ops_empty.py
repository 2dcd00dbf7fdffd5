"""Tensors without elements, in Triton's form of every op."""

from __future__ import annotations

import pytest
import torch

from tests.ops.empty_cases import CASES, assert_as_the_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("op", "dim"), CASES)
def test_without_one_dimension(op: str, dim: str, triton_device: torch.device) -> None:
    with triton_device:
        assert_as_the_reference(op, dim, "triton")
