"""Writes docs/results.md and its pictures from the metrics in docs/where_it_helps/ and docs/fashion_mnist/.

python docs/results_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import helps_section

from fastokd.recipe.names import Recipe
from fastokd.report.plots import as_svg, draw_all, on_white
from fastokd.report.pools import Pool, pool_runs
from fastokd.report.statistics import Sample, welch
from fastokd.run.folder import Run

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "fashion_mnist", HERE / "results.md"
PAPER = json.loads((HERE.parent / "fastokd/facts/paper_results.json").read_text())["okddip"]
PUBLISHED = {
    **{row.replace("_", "-") if "okddip" in row else row: value
       for row, value in PAPER["table2_cifar100"]["resnet32"].items()},
    **{f"okddip_{row}-branch": value
       for row, value in PAPER["table5_ablation_cifar100_resnet32"].items() if row != "okddip"},
}  # fmt: skip
# The paper's orderings, the better one first: by accuracy (its Tables 2 and 5) ...
ACCURACY = [
    *((row, "baseline") for row in ("ind", "dml", "cl_ilr", "one")),
    *((row, "baseline") for row in ("okddip-branch", "okddip-network")),
    ("okddip-branch", "cl_ilr"),
    ("okddip-branch", "one"),
    ("okddip-network", "dml"),
    ("okddip-network", "okddip-branch"),
    *(("okddip-branch", f"okddip_{part}-branch") for part in
      ("random", "entropy", "mean", "symmetric", "no_two_level")),
]  # fmt: skip
# ... and by diversity (its Figure 2).
DIVERSITY = [("ind", "okddip-branch"), ("okddip-branch", "one"), ("okddip-branch", "cl_ilr")]


@dataclass(frozen=True)
class Result:
    """The runs of one method and number of epochs, and the facts stored with their metrics."""

    name: str
    pool: Pool
    facts: tuple[dict[str, Any], ...]

    @property
    def epochs(self) -> int:
        return self.pool.recipe.epochs


def read_kept() -> list[Result]:
    """Every row, in the paper's order."""
    runs, facts = [], {}
    for path in sorted(KEPT.glob("*.jsonl")):
        first, *epochs = (json.loads(line) for line in path.read_text().splitlines())
        runs.append(Run(path, Recipe.from_json(first["recipe"]), epochs))
        facts[path] = first
    rows = [_row(pool, facts) for pool in pool_runs(runs)] if runs else []
    order = [*PUBLISHED, "ffsd"]
    return sorted(rows, key=lambda row: order.index(row.name))


def _row(pool: Pool, facts: dict[Path, dict[str, Any]]) -> Result:
    name = pool.runs[0].folder.name.rsplit("-", 2)[0]
    of = tuple(facts[run.folder] for run in pool.runs)
    return Result(name, replace(pool, label=name), of)


def page(rows: Sequence[Result], settings: Sequence[Any]) -> str:
    """docs/results.md, of docs/fashion_mnist/ and of docs/where_it_helps/."""
    where = rows[0].facts[0]["environment"]
    threads = {facts["threads"] for row in rows for facts in row.facts}
    parts = [
        "# Results",
        *helps_section.section(settings),
        "## On the whole of Fashion-MNIST",
        "Every method is trained on the whole set (60,000 training images, 10,000 test images) with ResNet-8.\n"
        "Every group has four networks, including the leader. The recipes are the named ones, shortened with\n"
        "`--epochs`. These runs are short: they show that the methods train, and don't reproduce the papers' results.\n\n"
        "The tables give top-1 on the test images in %, mean ± deviation over seeds, of the last epoch and of the best. The best\n"
        "epoch is chosen on the test set, as in the papers, so its accuracy is biased upwards. Diversity is the\n"
        "mean distance between peers' predictions. Every figure is measured-cpu.",
    ]
    for epochs in sorted({row.epochs for row in rows}):
        parts += _section([row for row in rows if row.epochs == epochs], epochs)
    parts += [
        "### How to reproduce them",
        f"On {where['cpu']}, {max(threads)} thread{'s' * (max(threads) > 1)} per run, two runs at a "
        f"time on two cores shared with other\nprograms, {where['precision']}, engine "
        f"`{where['engine']}`, torch {where['torch']}; data from Debian's\n"
        "`dataset-fashion-mnist`. CPU seconds are user and system time, including evaluation after each epoch\n"
        "and the steps that a killed run repeated. Wall seconds are of the training only; other programs on\n"
        "the machine increase them.",
        "    OMP_NUM_THREADS=1 python docs/results_fashion_mnist.py\n    python docs/results_page.py",
        "The first command trains the runs that are missing in `docs/fashion_mnist/` (one file per run: recipe,\n"
        "environment, metrics of every epoch). It can be killed and restarted, and several can run at once. The\n"
        "second command writes this page.",
    ]
    return "\n\n".join(parts) + "\n"


def _section(rows: Sequence[Result], epochs: int) -> list[str]:
    base = next((row.pool.last() for row in rows if row.name == "baseline"), None)
    table = [
        "| method | networks | seeds | reported | last epoch | difference from baseline, 95% interval | best "
        "epoch | ensemble | diversity | CPU seconds (wall) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pool = row.pool
        less = "" if base is None or row.name == "baseline" else str(welch(pool.last(), base))
        group = pool.recipe.students > 1
        ensemble = _sample(row, lambda test: 100 * test["ensemble_top1"]) if group else None
        diversity = _sample(row, lambda test: test["diversity"])
        seconds = Sample.of([facts["cpu_seconds"] for facts in row.facts]).mean
        wall = Sample.of([sum(line["seconds"] for line in run.metrics) for run in pool.runs]).mean
        table.append(
            f"| {row.name} | {pool.recipe.students} | {len(pool.runs)} | {pool.recipe.reported} "
            f"| {pool.last()} | {less} | {pool.best()} | {ensemble or ''} "
            f"| {_small(diversity)} | {seconds:.0f} ({wall:.0f}) |"
        )
    parts = [f"### {epochs} epochs", "\n".join(table)]
    parts += [
        f"![{what} over {epochs} epochs](fashion_mnist/{name}-{epochs}epochs.svg)"
        for name, what in (("diversity", "Diversity (Figure 2)"), ("accuracy", "Accuracy"))
        if (KEPT / f"{name}-{epochs}epochs.svg").is_file()
    ]
    reading = _reading(rows)
    return [
        *parts,
        *([f"#### The paper's orderings after {epochs} epochs", *reading] if reading else []),
    ]


def _reading(rows: Sequence[Result]) -> list[str]:
    """The paper's orderings: our difference with Welch's interval, beside the paper's difference."""
    of = {row.name: row for row in rows}
    lines, counts = [], {"appears": 0, "reversed": 0, "within the spread": 0, "too few seeds": 0}
    for what, pairs in (("top-1", ACCURACY), ("diversity", DIVERSITY)):
        for better, worse in pairs:
            if better in of and worse in of:
                ours, verdict = _compared(of[better], of[worse], what)
                counts[verdict] += 1
                published = ""
                if what == "top-1":
                    published = f"{PUBLISHED[worse][0] - PUBLISHED[better][0]:+.2f}"
                lines.append(
                    f"| {what} | {better} over {worse} | {published} | {ours} | {verdict} |"
                )
    if not lines:
        return []
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return [
        "\n".join(
            ["| metric | ordering | paper, CIFAR-100, ResNet-32 | here, 95% interval | verdict |", "|---|---|---|---|---|", *lines]
        ),
        f"Of {len(lines)} orderings: {said}. *Appears*: the interval is above 0. *Reversed*: it is below 0.\n"
        "*Within the spread*: it contains 0. With three seeds an interval is about four deviations wide, and one\n"
        "of twenty true nulls excludes 0. With a small student, an easy set and few epochs, the expected\n"
        "differences are tenths of a point. *Within the spread* is not evidence against the paper, whose\n"
        "students train for 300 epochs.",
    ]  # fmt: skip


def _compared(better: Result, worse: Result, what: str) -> tuple[str, str]:
    """The difference as text, and the verdict on the paper's ordering."""
    if what == "top-1":
        sides, digits = [row.pool.last() for row in (better, worse)], 2
    else:
        found = [_sample(row, lambda test: test["diversity"]) for row in (better, worse)]
        sides, digits = [sample for sample in found if sample is not None], 4
    difference = welch(*sides)
    text = f"{difference.value:+.{digits}f}"
    if difference.interval is None:
        return text, "too few seeds"
    low, high = difference.interval
    verdict = "appears" if low > 0 else "reversed" if high < 0 else "within the spread"
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]", verdict


def _sample(row: Result, value: Callable[[dict[str, Any]], float | None]) -> Sample | None:
    return row.pool.of_last(lambda epoch: value(epoch["test"]))


def _small(sample: Sample | None) -> str:
    if sample is None:
        return ""
    return f"{sample.mean:.4f}" + ("" if sample.std is None else f" ± {sample.std:.4f}")


def draw(rows: Sequence[Result]) -> dict[str, str]:
    """The plots by file name: diversity (Figure 2) and accuracy, for each number of epochs."""
    drawn = {}
    for epochs in sorted({row.epochs for row in rows}):
        pools = [row.pool for row in rows if row.epochs == epochs]
        # With a single method, the accuracy plot would show its students instead of the methods.
        figures = draw_all(pools) if len(pools) > 1 else {}
        for name in ("diversity", "accuracy"):
            if name in figures:
                drawn[f"{name}-{epochs}epochs.svg"] = on_white(as_svg(figures[name]))
    return drawn


def main() -> None:
    """Writes the plots first, because the page includes those that exist."""
    rows = read_kept()
    for name, svg in draw(rows).items():
        (KEPT / name).write_text(svg, encoding="utf-8")
    PAGE.write_text(page(rows, helps_section.read_all()))


if __name__ == "__main__":
    main()
