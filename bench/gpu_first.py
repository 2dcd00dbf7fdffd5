"""One command that tests and measures the program on a GPU.

    python3 bench/gpu_first.py --quick --budget 360 --out out
    python3 bench/gpu_first.py --budget 300 --only FAILED,SKIPPED --out out

It runs from a checkout: nothing is installed, built in C++ or downloaded. Each section has its own
process and time limit, and ``report.json`` is replaced after each. Without a GPU it is a dry run of
tiny shapes, whose figures must not be published.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.gpu.child import WIDTH  # noqa: E402
from bench.gpu.place import Place, card, compilers, sources  # noqa: E402
from bench.gpu.runner import Runner  # noqa: E402
from bench.gpu.table import SECTIONS, Section  # noqa: E402

KEPT_REPORT = ROOT / "docs" / "gpu" / "report.json"
# The words of --only that select sections by status.
ENDED = {"FAILED": ("failed", "timeout", "stopped", "running"), "SKIPPED": ("skipped",)}
DRY = "dry run on a CPU: these figures belong in no GPU column"
# Characters of the summary's errors: a caller may keep only the end of the output.
ERRORS = 6000


def main(arguments: Sequence[str] | None = None, table: Sequence[Section] = SECTIONS) -> int:
    """Runs the sections; returns 0, 1 if one failed, or 128 + n after signal n."""
    asked = _parser().parse_args(arguments)
    path: Path = asked.report or asked.out / "report.json"
    if not path.parent.is_dir():
        raise SystemExit(f"{path} can't be written: there is no folder {path.parent}")
    found = card()
    dry = asked.dry_run or found is None
    how = DRY if dry else "measured-gpu"
    if (kind := _kind(path)) not in (None, how):
        raise SystemExit(
            f"{path} is a report of another kind ({kind}), and this is: {how}; move it"
        )
    report: dict[str, Any] = {"how": how, "calls": [], "sections": {}}
    chosen = [section for section in table if section.quick or not asked.quick]
    if asked.only:
        report = _previous(asked.previous, path, how) or report
        chosen = _only(asked.only, chosen, report["sections"])
    elif kind == how:  # keeps the sections that this call doesn't measure
        report = _previous(path, path, how) or report
    for section in table:
        left_out = {"title": section.title, "status": "skipped", "error": "it wasn't asked for"}
        report["sections"].setdefault(section.name, left_out)
    report["calls"].append(
        {
            "how": how,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "asked": {name: getattr(asked, name) for name in ("quick", "budget", "only")},
            "card": found,
            **sources(),
            **({"commit": asked.commit} if asked.commit else {}),
            "compilers": compilers(),
        }
    )
    place = Place()
    runner = Runner(report, path, place, budget=asked.budget, dry=dry, say=_say)
    old = {number: signal.signal(number, runner.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        runner.run(chosen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        place.remove()
    _say(summary(report, [section.name for section in chosen]))
    if runner.stopped is not None:
        return 128 + runner.stopped
    return int(any(report["sections"][s.name]["status"] in ENDED["FAILED"] for s in chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of report.json")
    parser.add_argument("--report", type=Path, help="the report's file, in place of --out")
    parser.add_argument("--quick", action="store_true", help="the essentials alone")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds in all")
    parser.add_argument("--only", default="", help="sections' names, FAILED or SKIPPED; commas")
    parser.add_argument("--previous", type=Path, help="the report that --only goes on from")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--commit", help="where the checkout has no history of its own")
    return parser


def _kind(path: Path) -> str | None:
    """The ``how`` of the report in ``path``; None if there is no report."""
    try:
        return str(json.loads(path.read_text())["how"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _previous(asked: Path | None, path: Path, how: str) -> dict[str, Any] | None:
    """The report to continue: the named one, else the newest known one of this kind."""
    files = [asked] if asked else [file for file in (path, KEPT_REPORT) if file.exists()]
    reports = [json.loads(file.read_text()) for file in files]
    alike = [report for report in reports if report["how"] == how]
    if asked and not alike:
        raise SystemExit(f"{asked} is of another kind ({reports[0]['how']}), and this is: {how}")
    return max(alike, key=lambda report: report["calls"][-1]["started"], default=None)


def _only(text: str, table: Sequence[Section], known: dict[str, Any]) -> list[Section]:
    """The sections that ``text`` selects by name or status, in the table's order."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    names = {section.name for section in table}
    if unknown := [word for word in words if word not in names and word not in ENDED]:
        raise SystemExit(
            f"--only names {unknown[0]!r}: choose FAILED, SKIPPED or {', '.join(sorted(names))}"
        )
    if not known and names.isdisjoint(words):
        raise SystemExit(f"--only {text} needs a former report of this kind: name it by --previous")
    ended = {status for word in words for status in ENDED.get(word, ())}
    return [
        section
        for section in table
        if section.name in words
        or (known and known.get(section.name, {}).get("status", "skipped") in ended)
    ]


def summary(report: dict[str, Any], names: Sequence[str]) -> str:
    """All figures and rows, then the failures with their last lines."""
    lines = [f"--- {report['how']}: {(report['calls'][-1]['card'] or {}).get('name', 'no GPU')}"]
    errors: list[str] = []
    for name in names:
        entry = report["sections"][name]
        figures = entry.get("figures", {})
        lines += [f"{name:15} {key:42} {value:12.5g}" for key, value in figures.items()]
        lines += [f"  {_row(row)}" for row in entry.get("rows", []) if "ms" in row]
        if entry["status"] in ENDED["FAILED"]:
            said = [*entry.get("failures", [])[:12], *entry.get("error", "").splitlines()[-8:]]
            errors.append(f"{name} {entry['status']}:")
            errors += [f"  {text[:WIDTH]}" for text in said]
    text = "\n".join(errors)
    if len(text) > ERRORS:
        text = f"{text[:ERRORS]} [...]"
    return "\n".join([*lines, text or "nothing failed"])


def _row(row: dict[str, Any]) -> str:
    parts = [f"{row['name'][:44]:44} {row['ms']:9.3f} ms"]
    for key, form in (
        ("images_per_second", "{:8.0f} img/s"),
        ("peak_gb", "{:6.2f} GB"),
        ("gb_per_second", "{:7.0f} GB/s"),
        ("torch_ms", "torch {:8.4f} ms"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    return " ".join(parts)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
