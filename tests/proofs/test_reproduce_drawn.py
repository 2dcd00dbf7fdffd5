"""The dry run of ``fastokd reproduce all``: one cell of each table, on drawn images of the true sizes.

Table 3's are left out: its ResNet-34 on ImageNet takes two minutes, and ffsd's cell is a ResNet-18 on ImageNet.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastokd.cli import run_command
from fastokd.recipe.names import recipe
from fastokd.reproduce.speeds import Speeds
from fastokd.reproduce.standing import Standing
from fastokd.run.options import RunOptions

# A part of a recipe's name that leaves one run of the table, and its table.
CELLS = {
    "table1": "ind/densenet_40_12/cifar10",
    "table2": "one/resnet32/cifar100",
    "table4": "one-ensemble/resnet110/",
    "table5": "okddip_mean",
    "table6": "okddip_kd-branch/resnet32/cifar10",
    "figure3": "okddip-branch@8",
    "ffsd": "ffsd/resnet18/imagenet",
}


@pytest.mark.proof
@pytest.mark.parametrize("table", CELLS)
def test_a_cell_starts_stops_resumes_and_reports(table: str, tmp_path: Path) -> None:
    out = tmp_path / "r"
    command = ["reproduce", "all", "--drawn", "--only", CELLS[table], "--out", str(out)]
    assert run_command([*command, "--device", "cpu", "--quiet"]) == 0
    facts = json.loads((out / "reproduction.json").read_text())
    assert table in {cell["table"] for cell in facts["cells"]}
    assert {cell["state"] for cell in facts["cells"]} == {"done"}
    for name in facts["runs"]:
        assert (out / "logs" / f"{name}.txt").read_text().count("--- ") == 2
        (row,) = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
        assert row["step"] == 3
        assert row["test"]["mean_top1"] >= 0
        assert (out / name / "report.html").is_file()


@pytest.mark.proof
def test_a_class_is_measured_once(tmp_path: Path) -> None:
    of, same = recipe("dml/resnet8/digits"), recipe("okddip-network/resnet8/digits")
    said: list[str] = []
    speeds = Speeds(tmp_path, "here", threads=1)
    speeds.measure([of, same], RunOptions(device="cpu", precision="fp32"), 60.0, said.append)
    speeds.measure([same], RunOptions(device="cpu", precision="fp32"), 60.0, said.append)
    assert len(said) == 1
    found = Speeds(tmp_path, "here").estimate(same, Standing("missing"))
    assert found.how == "measured"
    assert 0 < found.hours < 10
