"""Images a second that recipes train, for the table in docs/data.md beside those of the loaders.

    python -m bench.needed_images [--write]

``fastokd plan`` models them for an H100 and an H200; docs/gpu/report.json has those measured on an H200.
``--write`` replaces the table in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastokd.plan.plan import plan
from fastokd.recipe.names import recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "data.md"
REGION = re.compile(r"(<!-- needed: now -->\n).*?(<!-- end -->)", re.DOTALL)
RECIPES = (
    *(f"{name}/resnet32/cifar100" for name in ("okddip-branch@4", "okddip-network@4", "ffsd")),
    *(f"{name}/resnet34/imagenet" for name in ("baseline", "ffsd")),
    *(f"okddip-{sharing}@4/resnet34/imagenet" for sharing in ("branch", "network")),
    *(f"{name}/resnet18/imagenet" for name in ("okddip-branch@4", "ffsd")),
)
HEADS = (
    "recipe",
    "students",
    "batch",
    "H100, default, modelled",
    "H100, fastest way, modelled",
    "H200, default, modelled",
    "H200, fastest way, modelled",
    "H200, fastest way, measured-gpu",
)


def row(name: str, report: dict[str, Any]) -> list[str]:
    """One line of the table; blank where nothing was measured."""
    of = recipe(name)
    cells = [f"`{name}`", str(of.students), str(of.batch_size)]
    for device in ("h100", "h200"):
        modelled = plan(of, device)["modelled"]
        ways = {way: found for way, found in modelled["ways"].items() if way != "reference"}
        fastest = of.batch_size / min(found["step_ms"] for found in ways.values()) * 1e3
        cells += [f"{modelled['images_per_second']:,.0f}", f"{fastest:,.0f}"]
    measured = [
        found["images_per_second"]
        for section in report["sections"].values()
        for found in section.get("rows", [])
        if found.get("recipe") == name
        and "images_per_second" in found
        and "published" not in found["name"]
    ]
    return [*cells, f"{max(measured):,.0f}" if measured else ""]


def table() -> str:
    """The table of all recipes."""
    report = json.loads((DOCS / "gpu" / "report.json").read_text())
    rows = [list(HEADS), ["---"] * len(HEADS), *(row(name, report) for name in RECIPES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/data.md")
    asked = parser.parse_args(arguments)
    made = table()
    print(made, end="")
    if asked.write:
        PAGE.write_text(REGION.sub(lambda m: f"{m[1]}{made}{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
