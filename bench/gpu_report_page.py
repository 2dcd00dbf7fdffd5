"""Writes the GPU columns of the documentation from reports of ``bench/gpu_first.py``.

    python -m bench.gpu_report_page report.json

Without an argument it reads the reports of docs/gpu. It rewrites only the text between
``<!-- gpu: NAME -->`` and ``<!-- /gpu -->``. Figures that weren't measured stay blank.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu import page_benchmarks, page_kernels, page_plan
from bench.gpu.child import write_whole
from bench.gpu.page import Measured, Region, read
from fastokd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "docs/benchmarks.md": page_benchmarks.REGIONS,
    "docs/kernels.md": page_kernels.REGIONS,
    "docs/plan.md": page_plan.REGIONS,
}
REGION = re.compile(r"(<!-- gpu: ([\w-]+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)
UNMEASURED = (
    "Nobody has measured this: `python bench/gpu_first.py --out .` on a machine with a GPU writes\n"
    "report.json, and `python -m bench.gpu_report_page report.json` fills this in."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the pages; returns 2 if a report can't be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("reports", nargs="*", type=Path, help="those of docs/gpu, if none is named")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose pages they are")
    asked = parser.parse_args(arguments)
    try:
        measured = Measured([read(path) for path in asked.reports or kept(asked.root)])
        texts = {page: rewritten(page, (asked.root / page).read_text(), measured) for page in PAGES}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for page, text in texts.items():
        write_whole(asked.root / page, text)
    return 0


def kept(root: Path) -> list[Path]:
    """The committed reports."""
    return sorted((root / "docs" / "gpu").glob("*.json"))


def rewritten(page: str, text: str, measured: Measured) -> str:
    """A page with rewritten regions.

    Raises:
        UserError: the page's regions aren't those that the program writes.
    """
    regions: Mapping[str, Region] = PAGES[page]
    names = [found[1] for found in REGION.findall(text)]
    if names != list(regions):
        raise UserError(
            f"{page} has the regions {names}: it must have {list(regions)}, in this order, each "
            "closed by <!-- /gpu -->"
        )
    return REGION.sub(lambda m: f"{m[1]}{regions[m[2]](measured) or UNMEASURED}\n{m[3]}", text)


if __name__ == "__main__":
    sys.exit(main())
