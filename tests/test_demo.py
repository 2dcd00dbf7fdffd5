"""The demo keeps its promise: the leader's last-epoch test accuracy, mean of three seeds."""

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
    runs = [Run.load(tmp_path / "demo" / f"okddip-seed{seed}") for seed in range(3)]
    leaders = [run.last["test"]["leader_top1"] for run in runs]
    assert sum(leaders) / 3 >= 0.98, leaders
    assert all((run.folder / "report-accuracy.png").is_file() for run in runs)
