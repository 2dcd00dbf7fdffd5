"""The claims, their table, and the report for whoever has a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.benchmark import claims
from fastokd.benchmark.claims import CLAIMS, Claim, Growth, Outcome
from fastokd.benchmark.equality import Agreement
from fastokd.benchmark.gpu_report import NO_GPU, gpu_report
from fastokd.benchmark.kernels import measure_kernels
from fastokd.benchmark.step import StepTiming
from fastokd.benchmark.worker import Spec
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipes import recipe

BENCH = Path(__file__).parent.parent.parent / "bench"
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
    return StepTiming(Spec(of, loop), seconds, 1e12, memory, FACTS)


def outcome(ours: StepTiming, theirs: StepTiming) -> Outcome:
    return Outcome(CLAIMS["okddip_branch"], Agreement(0.0, 0.0, 0.0, 0.0), ours, theirs)


def test_each_claim_has_a_bench_of_its_own() -> None:
    files = {path.stem.removeprefix("bench_step_") for path in BENCH.glob("bench_step_*.py")}
    assert files == {*CLAIMS, "students"}
    for name, claim in CLAIMS.items():
        assert claim.name == name
        recipe(claim.recipe, batch_size=claim.batch_size)
        assert f'claim("{name}")' in (BENCH / f"bench_step_{name}.py").read_text()


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """Not the ratio of medians: here 3, where the medians are 2 and 4."""
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
    found = Growth((timing(1.0, 2.0, students=2), timing(3.0, 4.0, students=4)))
    rows = found.to_json()["rows"]
    assert [row["students"] for row in rows] == [2, 4]
    assert [row["time"] for row in rows] == [1.0, 2.5]
    assert rows[0]["macs"] == 1.0 < rows[1]["macs"] < 2.0
    assert "2.50" in claims.growth_table(found)
    assert [spec.recipe.students for spec in claims.growth_specs()] == [1, 2, 4, 8]


def test_nothing_is_timed_that_isnt_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "agreement", lambda *_: Agreement(1.0, 0.0, 1.0, 0.0))
    monkeypatch.setattr(Spec, "settled", lambda self: self)
    with pytest.raises(UserError, match="isn't timed, for its step is not the published one"):
        claims.measure(TINY, claims.rounds(1))


def test_the_report_of_a_machine_without_a_gpu_says_so(
    tmp_path: Path,
    cpp_ops: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(CLAIMS, "tiny", TINY)
    monkeypatch.setattr(
        "fastokd.benchmark.gpu_report.measure_kernels",
        lambda device, scale: measure_kernels(device, rounds=1, scale=0.02),
    )
    path = tmp_path / "report.json"
    assert run_command(["bench", "--only", "tiny", "--steps", "1", "--gpu-report", str(path)]) == 0
    assert NO_GPU in capsys.readouterr().out
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["note"] == NO_GPU
    assert report["how"] == "measured-cpu"
    assert report["environment"]["torch"] == torch.__version__
    assert "impls" in report["doctor"]
    (step,) = report["steps"]
    assert step["claim"] == "tiny"
    assert step["equal"]
    assert step["fastokd"]["step_ms"] > 0
    assert len(report["kernels"]) == 5
    for row in report["kernels"]:
        assert row["impl"] == "cpp"
        assert row["equal"], row
        assert row["ratio"] > 0
    assert report["plans"][0]["modelled"]["how"] == "modelled: data sheet"


def test_a_claim_that_is_refused_doesnt_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("it can't be")

    monkeypatch.setattr("fastokd.benchmark.gpu_report.measure", refuse)
    monkeypatch.setattr("fastokd.benchmark.gpu_report.measure_kernels", lambda *_, **__: [])
    two = [dataclasses.replace(TINY, name=name) for name in ("one", "two")]
    report = gpu_report(two)
    assert [row["refused"] for row in report["steps"]] == ["it can't be"] * 2


def test_an_unknown_claim_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "--only", "okddip_brunch"]) == 2
    assert "okddip_branch" in capsys.readouterr().err
