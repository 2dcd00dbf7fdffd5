"""The GPU regions of the pages: the report's figures, blanks for missing ones, no other change."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_report_page
from bench.gpu import page_plan
from bench.gpu.page import COHORTS, Measured, read
from bench.gpu.table import SECTIONS
from fastokd.errors import UserError

ROOT = Path(__file__).parents[2]
QUICK = ("docs/benchmarks.md", "docs/kernels.md")


def step_row(name: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ms": ms,
        "quartiles_ms": [ms - 0.5, ms + 0.5],
        "images_per_second": 128e3 / ms,
        "peak_gb": 0.25,
        "steps": 20,
        "cudnn_benchmark": True,
        "finite": True,
        "tflop": 0.8,
        **more,
    }


def section(call: int = 0, **more: Any) -> dict[str, Any]:
    return {"title": "a section", "status": "ok", "call": call, "seconds": 12.3, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    """A report like a real one: two calls, and sections of every status."""
    call = {
        "how": "measured-gpu",
        "started": "2026-11-28T05:00:00Z",
        "card": {"name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1"},
    }
    machine = {"copy TB/s": 3.0, "8192^3 bfloat16 TFLOP/s": 800.0}
    tests = {"tests/gpu/test_step.py::good": ["passed", 1.0]}
    tests["tests/gpu/test_step.py::bad"] = ["failed", 2.0]
    line = {"epoch": 0, "step": 391, "seconds": 9.0, "images_per_second": 5555.0}
    line["skipped_steps"] = 0
    return {
        "how": "measured-gpu",
        "calls": [call, {**call, "started": "2026-11-28T05:10:00Z"}],
        "sections": {
            "machine": section(figures=machine, versions={"torch": "2.11.0", "triton": None}),
            "step": section(
                status="failed", figures={"passed": 1, "failed": 1, "skipped": 0}, tests=tests
            ),
            "steps_resnet32": section(
                torch="2.11.0",
                status="failed",
                rows=[
                    step_row("branch ResNet-32 captured", 4.0),
                    step_row("branch ResNet-32 eager", 10.0, cudnn_benchmark=False),
                    step_row("branch ResNet-32 grouped eager", 7.0, finite=False),
                    step_row("branch ResNet-32 published bf16", 12.0),
                    {
                        "name": "branch ResNet-32 published fp32",
                        "error": "Traceback\ntorch.OutOfMemoryError: CUDA | 2 GB",
                    },
                ],
            ),
            "steps_imagenet": {"title": "", "status": "skipped", "error": "it wasn't asked for"},
            "compile": section(
                1,
                rows=[step_row("branch ResNet-32 compiled + captured", 3.0)],
                figures={"first step s": 31.0},
            ),
            "op_times": section(
                1,
                rows=[
                    {"name": "fusion_step", "us": 20.0, "torch_us": 90.0, "gb_per_second": 1500.0},
                    {"name": "shifted_map", "torch_us": 40.0},
                ],
            ),
            "profile": section(
                rows=[
                    {
                        "name": "branch ResNet-32 eager",
                        "kernels": 780,
                        "launches": {"cudaLaunchKernel": 770, "cudaMemcpyAsync": 9},
                    }
                ]
            ),
            "train": section(
                figures={"images/s from end to end": 4444.0, "seconds in all": 22.5},
                rows=[
                    {"name": "begun", "lines": [line]},
                    {"name": "resumed", "lines": [line, {**line, "epoch": 1, "step": 782}]},
                ],
            ),
            "of another time": {"status": "ok", "call": 0},
        },
    }


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Faked: a plan takes half a minute; the proof makes real ones."""
    if "proof" in request.keywords:
        return
    ways = {
        "loop eager": {"step_ms": 5.7, "bound_ms": 1.9},
        "loop captured": {"step_ms": 2.0, "bound_ms": 1.9},
        "loop compiled + captured": {"step_ms": 1.05, "bound_ms": 0.8},
    }
    ways["grouped eager"] = ways["reference"] = ways["loop eager"]
    ways["grouped captured"] = ways["loop captured"]
    counted = {"launches_eager": {"loop": 765}, "peak_bytes": 240e6}
    made = {"counted": counted, "modelled": {"ways": ways}}
    monkeypatch.setattr(page_plan, "planned", lambda cohort, device, norm: made)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Copies of the pages in a folder."""
    (tmp_path / "docs").mkdir()
    for page in gpu_report_page.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def write(root: Path, *reports: dict[str, Any]) -> dict[str, str]:
    """The pages as the program rewrites them."""
    files = [root / f"{index}.json" for index in range(len(reports))]
    for file, report in zip(files, reports, strict=True):
        file.write_text(json.dumps(report))
    assert gpu_report_page.main([*map(str, files), "--root", str(root)]) == 0
    return {page: (root / page).read_text() for page in gpu_report_page.PAGES}


def line(text: str, begins: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {begins} |")]
    return found


def test_figures_and_blanks(report: dict[str, Any], root: Path) -> None:
    pages = write(root, report)
    text = pages["docs/benchmarks.md"]
    assert "measured-gpu, NVIDIA H100 80GB HBM3, 28 November 2026, torch 2.11.0" in text
    assert line(text, "device copy, TB/s read and written").endswith("| 3.00 |")
    assert line(text, "triton") == "| triton |  |"
    # 0.8 TFLOP in 4 ms are 200 TFLOP/s, a quarter of the card's; the loop's 12 ms are 3 times ours.
    assert line(text, "ours, loop, captured") == (
        "| ours, loop, captured | on | 4.000 (3.500 to 4.500) | 32,000 | 0.250 | 200 | 0.25 | 3.00 |  "
        "| 20 |"
    )
    assert line(text, "ours, loop, eager").startswith(
        "| ours, loop, eager | off | 10.00 (9.500 to 10.50)"
    )
    assert line(text, "ours, loop, compiled + captured").endswith("| 0.33 | 4.00 |  | 20 |")
    for blank in ("ours, grouped, eager", "published loop, fp32"):
        assert line(text, blank) == f"| {blank} |" + "  |" * 9
    assert "grouped, eager: its loss wasn't finite; published loop, fp32: torch.OutOfMemory" in text
    assert "**network ResNet-34**, 224x224, S 4, B 256: not measured." in text
    assert line(text, "begun") == "| begun | 1 | 391 | 9.00 | 5,555 | 0 |"
    assert line(text, "resumed") == "| resumed | 2 | 782 | 9.00 | 5,555 | 0 |"
    assert "4,444 images/s in 22.5 s" in text
    assert line(text, "`step`").startswith("| `step` | a section | failed | 1 | 1 | 0 | 12.3 |")
    assert line(text, "`ops`") == "| `ops` |" + "  |" * 7
    assert "branch ResNet-32 took 31.0 s; measured-gpu, NVIDIA H100" in text
    assert "Failed: `tests/gpu/test_step.py::bad`." in text
    ops = pages["docs/kernels.md"]
    assert line(ops, "fusion_step") == "| fusion_step | 20.0 | 1,500 | 0.50 | 90.0 | 4.50 |"
    assert line(ops, "shifted_map") == "| shifted_map |  |  |  | 40.0 |  |"
    plan = pages["docs/plan.md"]
    assert "| branch ResNet-32 | eager | 1.90 | 5.70 | 10.0 | -43 % |" in plan
    assert "| branch ResNet-32 | captured | 1.90 | 2.00 | 4.00 | -50 % |" in plan
    assert "| branch ResNet-32 | grouped eager | 1.90 | 5.70 |  |  |" in plan
    assert "| branch ResNet-32 | 765 | 770 | 780 |  | 0.240 | 0.250 | 0.250 |" in plan
    assert "| network ResNet-34 |" + "  |" * 7 in plan


def test_a_second_time_changes_nothing_and_nothing_else_is_touched(
    report: dict[str, Any], root: Path
) -> None:
    before = {page: (ROOT / page).read_text() for page in gpu_report_page.PAGES}
    once = write(root, report)
    assert write(root, report) == once
    for page, text in once.items():
        assert text != before[page]
        empty = [gpu_report_page.REGION.sub(r"\1\3", t) for t in (text, before[page])]
        assert empty[0] == empty[1]


def test_the_later_report_counts_and_cards_are_told_apart(
    report: dict[str, Any], root: Path
) -> None:
    """A share is of the same card's limit; sections that the later report skipped are the earlier one's."""
    later = copy.deepcopy(report)
    later["calls"] = [{**report["calls"][0], "started": "2026-12-01T00:00:00Z"}]
    later["calls"][0]["card"] = {"name": "NVIDIA L4"}
    names = ("branch ResNet-32 eager", "branch ResNet-32 published bf16")
    rows = [step_row(name, ms) for name, ms in zip(names, (20.0, 30.0), strict=True)]
    later["sections"] = {"steps_resnet32": section(rows=rows), "op_times": {"status": "skipped"}}
    for order in ([later, report], [report, later]):
        pages = write(root, *order)
        text = pages["docs/benchmarks.md"]
        assert line(text, "ours, loop, eager").endswith("| 0.250 | 40.0 |  | 1.50 |  | 20 |")
        assert line(text, "ours, loop, compiled + captured").endswith("| 0.33 |  |  | 20 |")
        assert "NVIDIA L4, 1 December 2026" in text
        assert "| fusion_step | 20.0 | 1,500 | 0.50 |" in pages["docs/kernels.md"]
        assert "| branch ResNet-32 | eager |  |  | 20.0 |  |" in pages["docs/plan.md"]


@pytest.mark.parametrize("name", [section.name for section in SECTIONS])
def test_any_section_may_be_missing(name: str, report: dict[str, Any]) -> None:
    report["sections"].pop(name, None)
    measured = Measured([report])
    for page in gpu_report_page.PAGES:
        gpu_report_page.rewritten(page, (ROOT / page).read_text(), measured)


def test_sections_that_ended_before_their_first_row(report: dict[str, Any], root: Path) -> None:
    """Missing figures give neither zeros nor empty tables."""
    for name in report["sections"]:
        report["sections"][name] = section(status="timeout")
    pages = write(root, report)
    assert "| device copy, TB/s read and written |  |" in pages["docs/benchmarks.md"]
    assert gpu_report_page.UNMEASURED in pages["docs/kernels.md"]
    assert gpu_report_page.UNMEASURED in pages["docs/plan.md"]


@pytest.mark.parametrize("of", ["report", "call"])
def test_a_dry_run_is_refused(
    of: str, report: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (report if of == "report" else report["calls"][1])["how"] = "dry run on a CPU"
    file = root / "dry.json"
    file.write_text(json.dumps(report))
    assert gpu_report_page.main([str(file), "--root", str(root)]) == 2
    assert capsys.readouterr().err == (
        f"{file} isn't measured-gpu (dry run on a CPU): run bench/gpu_first.py where a GPU is\n"
    )
    for page in gpu_report_page.PAGES:
        assert (root / page).read_text() == (ROOT / page).read_text()


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"how": "", "calls": [], "sections": {}}']
)
def test_what_is_no_report_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"other\.json is no report of bench/gpu_first\.py"):
        read(file)


@pytest.mark.parametrize("lost", ["<!-- gpu: card -->\n", "<!-- /gpu -->"])
def test_a_page_whose_marks_are_broken_is_refused(lost: str, report: dict[str, Any]) -> None:
    text = (ROOT / "docs/benchmarks.md").read_text().replace(lost, "", 1)
    with pytest.raises(UserError, match=r"docs/benchmarks\.md has the regions"):
        gpu_report_page.rewritten("docs/benchmarks.md", text, Measured([report]))


@pytest.mark.parametrize("page", [*QUICK, pytest.param("docs/plan.md", marks=pytest.mark.proof)])
def test_the_pages_are_what_the_program_makes(page: str) -> None:
    """The pages are as the reports in docs/gpu give them: no figure is written by hand."""
    measured = Measured([read(path) for path in gpu_report_page.kept(ROOT)])
    text = (ROOT / page).read_text()
    assert gpu_report_page.rewritten(page, text, measured) == text, (
        "run python -m bench.gpu_report_page"
    )


def test_the_sections_are_those_of_the_table() -> None:
    names = {section.name for section in SECTIONS}
    assert {name for _, sections in COHORTS.values() for name in sections} <= names
    assert {"machine", "op_times", "profile", "train"} <= names
    assert page_plan.device_of("NVIDIA H200") == "h200"
    assert page_plan.device_of("NVIDIA GeForce RTX 4090") == "rtx4090"
