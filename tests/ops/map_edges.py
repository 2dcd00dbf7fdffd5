"""The definitions' edges, for any implementation: a test file subclasses and names its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastokd import ops
from tests.ops.map_cases import LOSSES, OPS, draw, run


class Edges:
    impl: str
    device = torch.device("cpu")

    def target(self, values: list[float]) -> tuple[Tensor, Tensor, float]:
        """a, the target and r of a map whose squares are the attention (C = 1), the target
        recovered from what the shift added."""
        root_P = torch.tensor(values, device=self.device)
        energy_P = root_P.square()
        y_BCHW = root_P.view(1, 1, 1, -1)
        r = float(energy_P.norm())
        a_P = energy_P / r
        shift_P = (ops.shifted_map(y_BCHW, impl=self.impl) - y_BCHW).view(-1)
        return a_P, shift_P / r + a_P, r

    def test_what_is_looked_at_is_looked_away_from(self) -> None:
        a_P, target_P, r = self.target([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        # floor(6 / 3) = 2: the threshold is the second smallest, and its own sign is 0
        expected_P = torch.cat([a_P[:1], a_P.new_tensor([r / 2]), r - a_P[2:]])
        torch.testing.assert_close(target_P, expected_P, rtol=1e-5, atol=1e-6)

    def test_ties_at_the_threshold_all_have_sign_0(self) -> None:
        a_P, target_P, r = self.target([2.0, 1.0, 2.0, 2.0, 5.0, 6.0, 7.0])
        expected_P = torch.cat([torch.full_like(a_P, r / 2)[:4], r - a_P[4:]])
        expected_P[1] = a_P[1]
        torch.testing.assert_close(target_P, expected_P, rtol=1e-5, atol=1e-6)

    def test_three_pixels_are_enough(self) -> None:
        a_P, target_P, r = self.target([3.0, 1.0, 2.0])
        expected_P = torch.stack([r - a_P[0], a_P.new_tensor(r / 2), r - a_P[2]])
        torch.testing.assert_close(target_P, expected_P, rtol=1e-5, atol=1e-6)

    def test_ties_of_a_large_map(self) -> None:
        """81 pixels, more than one way of selecting: 30 zeros, of which the 27th is the threshold."""
        root_P = torch.arange(81.0).sub(29).clamp_min(0).flip(0)
        a_P, target_P, r = self.target(root_P.tolist())
        expected_P = torch.where(a_P == 0, r / 2, r - a_P)
        torch.testing.assert_close(target_P, expected_P, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("name", LOSSES)
    def test_zero_maps_have_no_gradient_and_no_nan(self, name: str) -> None:
        x, y = draw(2, dtype=torch.float32, layout="last", device=self.device)
        zero = torch.zeros_like(x)
        for found in (run(name, zero, y, self.impl), run(name, x, zero, self.impl)):
            assert all(value.isfinite().all() for value in found.values())

    @pytest.mark.parametrize("name", LOSSES)
    def test_below_eps_the_norm_is_constant(self, name: str) -> None:
        """Maps that aren't zero, with a norm below eps: their gradient has no second term."""
        x, y = draw(2, dtype=torch.float32, layout="last", device=self.device)
        for key, pair in (("grad_x", (x * 1e-14, y)), ("grad_y", (x, y * 1e-14))):
            ours = run(name, *pair, self.impl)
            theirs = run(name, *(m.double() for m in pair), "torch")
            if key in theirs:  # the other map's is a difference of equals
                torch.testing.assert_close(ours[key].double(), theirs[key], rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("name", LOSSES)
    def test_just_below_eps_the_norm_is_constant(self, name: str) -> None:
        """At half of eps the second term would be a quarter of the first: large enough to be seen."""

        def halved(m: Tensor) -> Tensor:
            power = 1 if name == "feature" else 2
            norm_B = (m if power == 1 else m.square().mean(1)).flatten(1).norm(dim=1)
            return m * (0.5e-12 / norm_B).pow(1 / power).view(-1, 1, 1, 1)

        x, y = draw(2, dtype=torch.float32, layout="last", device=self.device)
        for key, pair in (("grad_x", (halved(x), y)), ("grad_y", (x, halved(y)))):
            ours = run(name, *pair, self.impl)
            theirs = run(name, *(m.double() for m in pair), "torch")
            if key in theirs:  # the other map's is a difference of equals
                atol = 1e-5 * float(theirs[key].abs().max())
                torch.testing.assert_close(ours[key].double(), theirs[key], rtol=1e-4, atol=atol)

    def test_zero_maps_stay_zero(self) -> None:
        zero = torch.zeros(2, 3, 2, 2, device=self.device)
        assert (ops.attention_map(zero, impl=self.impl) == 0).all()
        assert (ops.shifted_map(zero, impl=self.impl) == 0).all()

    @pytest.mark.parametrize("name", OPS)
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_nan_stays_in_its_sample(self, name: str, poison: float) -> None:
        x, y = draw(dtype=torch.float32, layout="last", device=self.device)
        (y if name == "shifted" else x)[1, 2, 1, 1] = poison
        found = run(name, x, y, self.impl, asks=(True, False))
        result = found.get("grad_x", found["result"])
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()
        if name in LOSSES:
            assert found["result"].isnan()

    @pytest.mark.parametrize("name", OPS)
    def test_empty_batch(self, name: str) -> None:
        x, y = draw(B=0, dtype=torch.float32, layout="last", device=self.device)
        found = run(name, x, y, self.impl)
        if name in LOSSES:
            assert found.pop("result") == 0
        assert all(value.shape[0] == 0 for value in found.values())

    @pytest.mark.parametrize("name", OPS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes(self, name: str, dtype: torch.dtype) -> None:
        found = run(name, *draw(1, dtype=dtype, layout="last", device=self.device), self.impl)
        assert found.pop("result").dtype == (dtype if name == "shifted" else torch.float32)
        assert all(value.dtype == dtype for value in found.values())
