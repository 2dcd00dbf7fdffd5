"""The GPU region of docs/kernels.md: each op's time and its PyTorch form's."""

from __future__ import annotations

from bench.gpu.page import Measured, Region, number, ratio, table
from bench.gpu.page_benchmarks import COPY


def ops(measured: Measured) -> str | None:
    """A row for each op."""
    found = measured["op_times"]
    if not found.rows:
        return None
    copy = measured.ceiling(COPY, found.card)
    rows = [
        [
            row["name"],
            number(row.get("us")),
            number(row.get("gb_per_second")),
            number(ratio(row.get("gb_per_second"), None if copy is None else 1e3 * copy), 2),
            number(row.get("torch_us")),
            number(ratio(row.get("torch_us"), row.get("us"))),
        ]
        for row in found.rows
    ]
    heads = ["op", "us", "GB/s", "of the card's copy", "PyTorch's form, us", "ratio"]
    return f"{found.source}.\n\n{table(heads, rows)}"


REGIONS: dict[str, Region] = {"ops": ops}
