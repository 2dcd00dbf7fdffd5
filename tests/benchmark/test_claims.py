"""The claims and their table."""

from __future__ import annotations

import json

import pytest

from fastokd.benchmark import claims
from fastokd.benchmark.claims import CLAIMS, Claim, Outcome, growth
from fastokd.benchmark.equality import StepErrors
from fastokd.benchmark.step import StepTiming
from fastokd.benchmark.worker import Spec
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe

TINY = Claim("tiny", "a tiny cohort", "okddip-branch/resnet8/digits", batch_size=4, ours="fp32")
FACTS = {
    "device": "cpu",
    "device_name": "a CPU",
    "engine": "loop",
    "way": "loop, eager",
    "impls": {},
    "precision": "bf16",
    "threads": 2,
}


def timing(
    *seconds: float, loop: str = "fastokd", students: int = 4, memory: int = 10
) -> StepTiming:
    of = recipe(f"okddip-branch@{students}/resnet8/digits", batch_size=4)
    return StepTiming(Spec(of, loop), seconds, 1e12, 2e12, memory, FACTS)


def outcome(ours: StepTiming, theirs: StepTiming) -> Outcome:
    return Outcome(CLAIMS["okddip_branch"], StepErrors(0.0, 0.0, 0.0, 0.0), ours, theirs)


def test_each_claim_can_be_measured() -> None:
    for name, claim in CLAIMS.items():
        assert claim.name == name
        recipe(claim.recipe, batch_size=claim.batch_size)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """Not the ratio of the medians: here the ratio is 3, and the medians are 2 and 4."""
    found = outcome(timing(1.0, 2.0, 4.0), timing(3.0, 6.0, 4.0, loop="reference", memory=20))
    assert found.ratios() == (2.0, 3.0, 3.0)
    row = found.to_json()
    assert row["ratio"] == 3.0
    assert row["memory_ratio"] == 0.5
    assert row["equal"]
    assert json.dumps(row)
    text = claims.table([found])
    assert "3.00 (2.00 to 3.00)" in text
    assert "2.40" in text


def test_growth_is_in_units_of_one_student() -> None:
    found = growth([timing(1.0, 2.0, students=2), timing(3.0, 4.0, students=4)])
    rows = found["rows"]
    assert [row["students"] for row in rows] == [2, 4]
    assert [row["time"] for row in rows] == [1.0, 2.5]
    assert rows[0]["macs"] == 1.0 < rows[1]["macs"] < 2.0
    assert "2.50" in claims.growth_table(found)
    assert [spec.recipe.students for spec in claims.growth_specs()] == [1, 2, 4, 8]


def test_nothing_is_timed_that_isnt_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "step_errors", lambda *_: StepErrors(1.0, 0.0, 1.0, 0.0))
    monkeypatch.setattr(Spec, "settled", lambda self: self)
    with pytest.raises(UserError, match="isn't timed, for its step is not the published one"):
        claims.measure(TINY, claims.rounds(1))


def test_an_unknown_claim_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "--only", "okddip_brunch"]) == 2
    assert "okddip_branch" in capsys.readouterr().err
