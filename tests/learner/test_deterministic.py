"""What ``--deterministic`` decides before a step is taken; what it gives is tests/gpu's."""

from __future__ import annotations

import os

import pytest
import torch

from fastokd.device import set_kernel_selection
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.out_of_memory import saying_what_fits
from fastokd.run.tuning import tune

pytestmark = pytest.mark.usefixtures("own_kernel_selection")
GPU = torch.device("cuda")


def test_a_gpu_takes_the_fastest_algorithms_by_default() -> None:
    set_kernel_selection(GPU, deterministic=False)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_admits_repeatable_kernels_alone() -> None:
    set_kernel_selection(GPU, deterministic=True)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_kernel_selection(GPU, deterministic=False)
    assert not torch.backends.cudnn.benchmark


def test_a_program_that_is_deterministic_already_stays_so() -> None:
    torch.use_deterministic_algorithms(True)
    set_kernel_selection(GPU, deterministic=False)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()


def test_no_timing_chooses_a_deterministic_run_s_engine() -> None:
    one = recipe("okddip-branch/resnet8/digits", epochs=300)
    session = build(one, RunOptions(deterministic=True, quiet=True))
    assert session.settled
    assert tune(session, 100_000) == []
    assert session.learner.choice.engine == "loop"
    assert session.how()["deterministic"]


def test_an_operator_without_a_deterministic_form_is_a_sentence() -> None:
    session = build(
        recipe("baseline/resnet8/digits"), RunOptions(deterministic=True, quiet=True, impl="torch")
    )
    said = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set"
    batch = session.stream.batch(0, 0)
    with (
        pytest.raises(
            UserError, match="adaptive_avg_pool2d_backward_cuda has no deterministic form"
        ),
        saying_what_fits(session, *batch),
    ):
        raise RuntimeError(said)
