"""mixture_distillation in C++ against float64, on each instruction set that this CPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastokd.ops import cpp
from tests.ops.mixture_cases import (
    NAMES,
    assert_second_labels_may_be_out_of_range,
    assert_within_budget,
    draw,
)

INF = math.inf
pytestmark = pytest.mark.usefixtures("cpp_ops", "_poisoned")


@pytest.fixture
def _poisoned(cpp_ops: None) -> Iterator[None]:
    """torch.empty holds NaN, and so does the ops' scratch memory: what isn't written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    for dtype in (torch.float32, torch.bfloat16):
        nan = draw(8, 2, 1100, 3, dtype=dtype, mixture_ce_weight=1.0)
        for mix in ("logits", "probs"):
            replace(nan, logits_SBC=nan.logits_SBC * math.nan, mix=mix).run("cpp")
    yield
    torch.use_deterministic_algorithms(False)


# 2 and 10 are less than a vector, 100 and 1,003 end in a part of one, 1,000 in half a padded row.
@pytest.mark.parametrize("C", [2, 10, 100, 1000, 1003])
@pytest.mark.parametrize("mix", ["logits", "probs", "pairwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_budget(capability: str, C: int, mix: str, dtype: torch.dtype) -> None:
    for S, E, detach in ((4, 0, False), (2, 2, False), (3, 1, True), (1, 1, False), (8, 8, False)):
        assert_within_budget(
            draw(S, 3, C, E, dtype=dtype, mix=mix, detach_targets=detach, incoming=0.37)
        )
    assert_within_budget(
        draw(
            *(4, 2, C, 1),
            dtype=dtype,
            mix=mix,
            ce_weight=torch.tensor([1.0, 0.5, 0.0, 2.0]),
            kd_weight=torch.tensor(0.3, dtype=torch.float64),
            mixture_ce_weight=torch.tensor([0.3, 0.0, 1.0, 0.0]),
            temperature=torch.tensor(2.5),
            label_smoothing=0.1,
            incoming=-1.7,
        )
    )


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("C", [2, 10, 1003])
@pytest.mark.parametrize("mix", ["logits", "probs", "pairwise"])
def test_mixed_labels_and_weights_of_samples(C: int, mix: str) -> None:
    # Four students without smoothing would go the way of the most frequent case.
    for mixed, weighted in ((True, False), (False, True), (True, True)):
        options = {"mix": mix, "mixed": mixed, "weighted": weighted}
        assert_within_budget(draw(4, 5, C, **options))
        assert_within_budget(
            draw(3, 5, C, 1, mixture_ce_weight=0.3, label_smoothing=0.1, **options)
        )
    assert_within_budget(draw(3, 3, C, mix=mix, soft=True, weighted=True, label_smoothing=0.1))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("S", [3, 5])  # rows side by side, and one after another
def test_many_classes(S: int) -> None:
    """ImageNet-21k: sums over that many classes keep their accuracy."""
    for mix in ("logits", "probs", "pairwise"):
        assert_within_budget(draw(S, 2, 22_000, mix=mix))


@pytest.mark.usefixtures("capability")
def test_mixtures_whose_powers_nearly_underflow() -> None:
    """Two students, each sure of a class of its own: their mixture is far below 0 everywhere, and
    its powers reach a float32's end, one class after another."""
    for apart in range(160, 190, 2):
        case = draw(2, 16, 50, temperature=1.0, batched=False, seed=apart)
        case.scores[:] = 0.0
        for s in range(2):
            case.logits_SBC[s, :, s] += apart
        exact = case.double().run("torch")
        for name, x in case.run("cpp").items():
            # A mixed logit of 90 is rounded by 4e-6.
            torch.testing.assert_close(x.double(), exact[name], rtol=1e-4, atol=2e-5)


@st.composite
def calls(d: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``draw``."""
    S = d(st.integers(1, 8))
    weights = st.sampled_from([0.0, 1.0, torch.tensor(0.5), torch.linspace(0, 2, S)])
    return {
        "S": S,
        "B": d(st.integers(0, 5)),
        "C": d(st.one_of(st.integers(2, 70), st.sampled_from([100, 333, 1003]))),
        "E": d(st.integers(0, 3)),
        "dtype": d(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "batched": d(st.booleans()),
        "soft": (soft := d(st.booleans())),
        "mixed": not soft and d(st.booleans()),
        "weighted": d(st.booleans()),
        "listens": d(st.sampled_from([1.0, 0.5, 0.2])),
        "padding": d(st.sampled_from([0, 0, 1, 8])),
        "seed": d(st.integers(0, 99)),
        "ce_weight": d(weights),
        "kd_weight": d(weights),
        "mixture_ce_weight": d(st.one_of(st.just(0.0), weights)),
        "temperature": d(st.sampled_from([1.0, 2.0, 3.0, 0.7, torch.tensor(4.0)])),
        "mix": d(st.sampled_from(["logits", "probs", "pairwise"])),
        "detach_targets": d(st.booleans()),
        "label_smoothing": d(st.sampled_from([0.0, 0.0, 0.1])),
        "incoming": d(st.sampled_from([1.0, 1.0, 0.25, -3.1])),
        "asks": d(st.tuples(st.booleans(), st.booleans(), st.booleans())),
    }


@settings(max_examples=120, deadline=None, database=None)
@given(call=calls(), name=st.sampled_from(["default", "avx2", "avx512"]))
def test_any_call_is_within_budget(call: dict[str, Any], name: str) -> None:
    before = cpp.capability()
    cpp.set_capability(name)
    try:
        assert_within_budget(draw(**call))
    finally:
        cpp.set_capability(before)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("mix", ["logits", "probs", "pairwise"])
class TestEdges:
    def test_unheard_source_may_be_nan(self, mix: str) -> None:
        clean = draw(3, 4, 20, 2, mix=mix, mixture_ce_weight=1.0)
        clean.scores[:, :, 2] = clean.scores[:, 2] = -INF  # student 2 is apart
        clean.scores[:, :, 4] = -INF  # and so is the second extra
        clean.logits_SBC[2] = 1.0
        nan = replace(clean, logits_SBC=clean.logits_SBC.clone(), extra_EBC=clean.extra_EBC.clone())
        nan.logits_SBC[2] = math.nan
        nan.extra_EBC[1] = math.nan
        before, after = clean.run("cpp"), nan.run("cpp")
        assert after["ce_S"].isnan().tolist() == [False, False, True]
        assert torch.equal(before["kd_S"], after["kd_S"])
        assert torch.equal(before["grad_logits"][:2], after["grad_logits"][:2])
        assert torch.equal(before["grad_scores"], after["grad_scores"])
        assert torch.equal(before["grad_extra"], after["grad_extra"])
        assert (after["grad_extra"][1] == 0).all()

    def test_heard_nan_reaches_its_listener_alone(self, mix: str) -> None:
        case = draw(3, 2, 20, mix=mix)
        case.scores[:, 1, 2] = -INF
        case.logits_SBC[2] = math.nan
        assert case.run("cpp")["kd_S"].isnan().tolist() == [True, False, True]

    def test_no_target_is_zero(self, mix: str) -> None:
        case = draw(3, 4, 20, 1, mix=mix, mixture_ce_weight=1.0, ce_weight=0.0)
        case.scores[:] = -INF
        case.logits_SBC[1] = math.nan
        found = replace(case, ce_weight=torch.tensor([1.0, 0.0, 1.0])).run("cpp")
        assert found["kd_S"].tolist() == [0.0, 0.0, 0.0]
        for name in ("grad_extra", "grad_scores"):
            assert (found[name] == 0).all()
        assert found["grad_logits"][[0, 2]].isfinite().all()

    def test_empty_batch(self, mix: str) -> None:
        for batched in (False, True):
            found = draw(3, 0, 10, 1, batched=batched, mix=mix, mixture_ce_weight=1.0).run("cpp")
            assert found["total"] == 0
            assert (found["ce_S"] == 0).all()
            assert all((found[name] == 0).all() for name in NAMES[3:])

    def test_shift_changes_nothing(self, mix: str) -> None:
        case = draw(3, 4, 100, 1, mix=mix)
        # Multiples of 1/64 stay exact when 100 is added.
        rounded = (case.logits_SBC * 64).round() / 64
        before = replace(case, logits_SBC=rounded).run("cpp")
        after = replace(case, logits_SBC=rounded + 100).run("cpp")
        for name in NAMES:
            assert torch.equal(before[name], after[name])

    def test_saturated_logits(self, mix: str) -> None:
        case = draw(3, 4, 50, 1, mix=mix, mixture_ce_weight=1.0)
        for scale in (1e4, 1e30):
            huge = replace(
                case, logits_SBC=case.logits_SBC * scale, extra_EBC=case.extra_EBC * scale
            )
            assert all(x.isfinite().all() for x in huge.run("cpp").values())
            if scale < 1e30:
                assert_within_budget(huge)

    def test_underflowing_probabilities(self, mix: str) -> None:
        """Classes to which no source gives a float32's probability still have a log."""
        case = draw(3, 4, 50, 1, mix=mix, temperature=1.0)
        case.logits_SBC[:, :, :20] -= 300
        case.extra_EBC[:, :, :20] -= 200
        assert_within_budget(case)

    def test_label_out_of_range(self, mix: str) -> None:
        for label in (10, -1, 2**40, -(2**62)):
            case = draw(3, 4, 10, mix=mix, mixture_ce_weight=torch.tensor([1.0, 0.0, 0.0]))
            case.labels_B[1] = label
            found = case.run("cpp")
            assert found["total"].isnan()
            assert found["grad_logits"][:, 1].isnan().all()
            assert found["grad_logits"][:, [0, 2, 3]].isfinite().all()
            assert found["grad_scores"][[0, 2, 3]].isfinite().all()

    def test_second_label_out_of_range(self, mix: str) -> None:
        case = draw(3, 4, 10, mix=mix, mixed=True, mixture_ce_weight=torch.tensor([1.0, 0.0, 0.0]))
        assert_second_labels_may_be_out_of_range(case, "cpp")

    def test_strides(self, mix: str) -> None:
        """Padded, transposed and broadcast rows and scores; nothing beyond a row is read."""
        case = draw(3, 4, 21, 2, mix=mix, mixture_ce_weight=1.0)
        plain = case.run("cpp")
        wide = torch.full((4, 3, 32), math.nan)
        wide[:, :, :21] = case.logits_SBC.transpose(0, 1)
        strided = replace(
            case,
            logits_SBC=wide.transpose(0, 1)[..., :21],
            scores=case.scores.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            labels_B=torch.stack([case.labels_B, case.labels_B + 99], 1)[:, 0],
        )
        for name, x in strided.run("cpp").items():
            assert torch.equal(x, plain[name])
        same = replace(
            case,
            logits_SBC=case.logits_SBC[:1, :1].expand(3, 4, 21),
            extra_EBC=None,
            scores=torch.randn(4, 1, 3).expand(4, 3, 3),
        )
        assert_within_budget(same)
