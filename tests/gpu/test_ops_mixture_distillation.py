"""The Triton kernel of mixture_distillation against float64, by error budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from fastokd.kernels import mixture_distillation as kernel

from tests.ops.mixture_cases import (
    Case,
    assert_second_labels_may_be_out_of_range,
    assert_within_budget,
)
from tests.ops.mixture_cases import draw as draw_case

pytestmark = pytest.mark.gpu
INF = math.inf
MIXES = ("logits", "probs", "pairwise")
Draw = Callable[..., Case]


@pytest.fixture
def draw(poisoned_device: torch.device) -> Draw:
    """Draws a call where the kernels run."""
    return partial(draw_case, device=poisoned_device)


def check(case: Case) -> None:
    assert_within_budget(case, "triton")


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks of 32, as if they were too many for the registers."""
    monkeypatch.setattr(kernel, "block_and_warps", lambda *_: (32, 1))


# Two classes; ten; one hundred in few threads; one thousand, and past it a ragged row.
@pytest.mark.parametrize("C", [2, 10, 100, 1003])
def test_classes(C: int, draw: Draw) -> None:
    check(draw(S=3, B=2, C=C, listens=0.8, incoming=0.37))


# CIFAR-100's and ImageNet's batches; few images under the interpreter, which takes one at a time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "C"), [(128, 100), (256, 1000)])
def test_training_shapes(
    B: int, C: int, dtype: torch.dtype, draw: Draw, triton_device: torch.device
) -> None:
    check(draw(S=4, B=2 if triton_device.type == "cpu" else B, C=C, dtype=dtype))


# One student alone, up to the paper's largest group, and all that fits; two loops from 9 students.
@pytest.mark.parametrize(("S", "E"), [(1, 0), (1, 1), (2, 3), (8, 0), (9, 7), (16, 0)])
def test_students_and_extras(S: int, E: int, draw: Draw) -> None:
    check(draw(S=S, B=1, E=E, listens=0.7))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("detach", [False, True])
def test_mixes(mix: str, detach: bool, draw: Draw) -> None:
    options = {"mix": mix, "detach_targets": detach, "label_smoothing": 0.1, "temperature": 1.7}
    check(draw(B=2, C=21, E=1, listens=0.7, mixture_ce_weight=0.3, **options))


@pytest.mark.parametrize("mix", MIXES)
def test_sweeps(mix: str, sweeps: None, draw: Draw) -> None:
    """Three full blocks and a ragged one, soft labels, gradients of one matrix of scores."""
    options = {"mix": mix, "soft": True, "batched": False, "label_smoothing": 0.2}
    check(draw(S=2, B=2, C=101, E=1, listens=0.7, mixture_ce_weight=0.3, **options))


def test_sweeps_of_a_detached_target(sweeps: None, draw: Draw) -> None:
    check(draw(B=3, C=64, detach_targets=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [0, 6])
def test_half_precision_and_padded_rows(dtype: torch.dtype, padding: int, draw: Draw) -> None:
    check(draw(S=4, B=3, C=10, E=2, dtype=dtype, padding=padding, incoming=1.9))


def test_loss_scale(draw: Draw) -> None:
    """Under a GradScaler at B 256: each gradient is a 256th, most below fp16's smallest number."""
    share = 3 / 256
    weights = {"ce_weight": share, "kd_weight": 0.7 * share, "incoming": 65536.0}
    case = draw(S=4, B=3, C=1000, dtype=torch.float16, **weights)
    check(case)
    saved = kernel.mixture_distillation(
        case.logits_SBC, None, case.labels_B, case.scores, None, None, None, None, None,
        share, 0.7 * share, 0.0, 3.0, "logits", False, 0.0, True, False, False, False,
    )[3][0]  # fmt: skip
    assert saved.dtype == torch.float32
    assert (saved.abs() < torch.finfo(torch.float16).smallest_normal).float().mean() > 0.9


def test_weights_and_temperature_on_the_device(draw: Draw, triton_device: torch.device) -> None:
    check(
        draw(
            B=2,
            ce_weight=torch.tensor([1.0, 0.5, 2.0], device=triton_device),
            kd_weight=torch.tensor(0.7, device=triton_device),
            mixture_ce_weight=torch.tensor([1.0, 0.0, 0.0], device=triton_device),
            temperature=torch.tensor(2.5, device=triton_device),
        )
    )


def test_a_weight_is_its_number_times_its_tensor(draw: Draw, triton_device: torch.device) -> None:
    """And so is the temperature; the public function has only ever one of the two."""
    case = draw(B=2)
    tensors = [torch.tensor(x, device=triton_device) for x in ([1.0, 0.5, 2.0], 0.7, 0.3, 2.5)]
    numbers = [0.5, 0.25, 2.0, 0.5]
    products = [x * number for x, number in zip(tensors, numbers, strict=True)]
    found, expected = (
        kernel.mixture_distillation(
            case.logits_SBC, None, case.labels_B, case.scores, None, *weights, *factors,
            "logits", False, 0.0, True, False, True, False,
        )
        for weights, factors in ((tensors, numbers), (products, [1.0] * 4))
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_strides(draw: Draw) -> None:
    """Logits that lie [B, S, C], labels from a wider tensor, one row of scores for all."""
    case = draw(S=3, B=3, C=12, E=1)
    logits_SBC = case.logits_SBC.transpose(0, 1).contiguous().transpose(0, 1)
    labels_B = case.labels_B[:, None].expand(-1, 2).contiguous()[:, 0]
    scores = case.scores[:, :1].expand(-1, 3, -1)
    check(replace(case, logits_SBC=logits_SBC, labels_B=labels_B, scores=scores))


@pytest.mark.parametrize("asks", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_one_at_a_time(asks: tuple[bool, bool, bool], draw: Draw) -> None:
    check(draw(B=1, E=1, asks=asks))


def test_no_gradient(draw: Draw) -> None:
    check(draw(B=1, asks=(False, False, False)))


def test_empty_batch(draw: Draw) -> None:
    found = draw(B=0, E=1, mixture_ce_weight=1.0).run("triton")
    assert found["total"] == 0
    assert found["kd_S"].tolist() == [0, 0, 0]
    assert found["grad_scores"].shape == (0, 3, 4)
    assert found["grad_logits"].shape == (3, 0, 10)


@pytest.mark.parametrize("mix", MIXES)
def test_unheard_source_may_be_nan(mix: str, draw: Draw) -> None:
    case = draw(S=3, B=2, E=1, mix=mix, mixture_ce_weight=0.5)
    case.scores[:, :, 3] = -INF
    assert case.extra_EBC is not None
    clean = case.run("triton")
    case.extra_EBC.fill_(math.nan)
    found = case.run("triton")
    for name, x in clean.items():
        assert torch.equal(found[name], x), name
    assert (found["grad_extra"] == 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, of the interpreter
def test_failed_student_apart_fails_alone(sweeps: None, draw: Draw) -> None:
    case = draw(S=3, B=1, C=40)
    case.scores[:, :, 2] = -INF
    case.scores[:, 2] = -INF
    case.logits_SBC[2] = math.nan
    found = case.run("triton")
    assert found["grad_logits"][:2].isfinite().all()
    assert found["ce_S"].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("mix", MIXES)
def test_row_without_sources_has_no_target(mix: str, draw: Draw) -> None:
    case = draw(B=2, mix=mix, mixture_ce_weight=0.5)
    case.scores[:, 1] = -INF
    check(case)
    found = case.run("triton")
    assert found["kd_S"][1] == 0
    assert (found["grad_scores"][:, 1] == 0).all()


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_label_out_of_range_is_nan_for_its_sample(label: int, draw: Draw) -> None:
    case = draw(B=3, C=10)
    case.labels_B[1] = label
    found = case.run("triton")
    assert found["total"].isnan()
    assert found["grad_logits"][:, 1].isnan().all()
    assert found["grad_logits"][:, [0, 2]].isfinite().all()
    assert found["grad_scores"].isfinite().all()


@pytest.mark.parametrize(
    ("mixed", "weighted", "C", "mixes"),
    [(True, False, 10, ["probs"]), (False, True, 10, ["pairwise"]), (True, True, 100, MIXES)],
)
def test_mixed_labels_and_weights_of_samples(
    mixed: bool, weighted: bool, C: int, mixes: list[str], draw: Draw
) -> None:
    for mix in mixes:
        options = {"mix": mix, "mixed": mixed, "weighted": weighted, "mixture_ce_weight": 0.3}
        check(draw(S=2, B=4, C=C, E=1, label_smoothing=0.1, **options))


def test_mixed_labels_and_weights_in_half_precision(draw: Draw) -> None:
    check(draw(S=4, B=4, C=100, mixed=True, weighted=True, dtype=torch.bfloat16))


def test_mixed_labels_in_sweeps(sweeps: None, draw: Draw) -> None:
    check(draw(S=2, B=4, C=40, mixed=True, weighted=True, label_smoothing=0.1))
    check(draw(S=3, B=2, C=70, soft=True, weighted=True, label_smoothing=0.1))


def test_second_label_out_of_range(draw: Draw) -> None:
    assert_second_labels_may_be_out_of_range(draw(S=2, B=4, C=10, mixed=True), "triton")


def test_second_labels_by_stride(draw: Draw) -> None:
    case = draw(S=2, B=4, C=12, mixed=True, weighted=True)
    assert case.mixed_with is not None
    assert case.sample_weight_B is not None
    labels2_B, share2_B, weight_B = (
        torch.stack([x, x + 1], 1)[:, 0] for x in (*case.mixed_with, case.sample_weight_B)
    )
    strided = replace(case, mixed_with=(labels2_B, share2_B), sample_weight_B=weight_B)
    found, expected = strided.run("triton"), case.run("triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mix", MIXES)
def test_shift_changes_nothing(mix: str, draw: Draw) -> None:
    case = draw(B=1, C=100, mix=mix)
    # Multiples of 1/8, which stay exact.
    case = replace(case, logits_SBC=(case.logits_SBC * 8).round() / 8)
    before, after = (
        case.run("triton"),
        replace(case, logits_SBC=case.logits_SBC + 128).run("triton"),
    )
    for name, x in before.items():
        torch.testing.assert_close(after[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_saturated_logits(mix: str, draw: Draw) -> None:
    case = draw(B=2, mix=mix)
    check(replace(case, logits_SBC=case.logits_SBC * 1e4))
