"""The demo keeps its promises: the leader's accuracy on right labels, and its gain among wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastokd import demo
from fastokd.data import load_dataset
from fastokd.run.folder import Run

pytestmark = pytest.mark.usefixtures("all_digits")


def test_nearest_neighbours_are_the_bar_to_clear() -> None:
    assert demo.nearest_neighbours(load_dataset("digits")) == pytest.approx(0.967, abs=0.005)


@pytest.mark.proof
def test_the_leader_reaches_98_percent(
    figures: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path / "demo")])
    demo.main()
    printed = capsys.readouterr().out
    for row in ("leader", "peer 0", "mean of all", "ensemble", "alone", "neighbours", "diversity"):
        assert row in printed
    assert "leader less alone, 95% interval" in printed
    assert "mean less alone, 95% interval" in printed
    out = tmp_path / "demo"
    assert top1(out, "okddip", "leader_top1") >= 0.98
    better, alone = (top1(out, f"wrong-labels{end}", "mean_top1") for end in ("", "-alone"))
    assert better > alone
    assert all((run / "report-accuracy.png").is_file() for run in out.glob("*-seed?"))


def top1(out: Path, runs: str, of: str) -> float:
    """The mean of three seeds."""
    found = [Run.load(out / f"{runs}-seed{seed}").last["test"][of] for seed in range(3)]
    return float(sum(found)) / 3
