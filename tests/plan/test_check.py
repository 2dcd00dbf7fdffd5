"""The model of a CPU, compared with measured steps."""

from __future__ import annotations

import pytest

from fastokd.plan.check import ModelledStep, check
from fastokd.plan.devices import Cpu
from fastokd.recipe.names import recipe


def test_both_programs_are_predicted_and_measured() -> None:
    cpu = Cpu.calibrated("fp32", sizes=[1 << 14, 1 << 20])
    of = recipe("okddip-branch/resnet8/digits", batch_size=4)
    ours, theirs = check(of, cpu, steps=2)
    assert (ours.program, theirs.program) == ("fastokd", "reference")
    for found in (ours, theirs):
        assert found.measured_ms > 0
        assert found.modelled_ms == sum(found.terms_ms.values()) > 0
        assert f"{found.error:+.1%}" in str(found)


def test_the_error_is_the_models() -> None:
    found = ModelledStep("r", "fastokd", {"product": 80.0, "norm": 40.0}, 100.0)
    assert found.error == pytest.approx(0.2)
    assert found.modelled_ms == 120.0
