"""The first part of docs/results.md: the sentences and tables of the runs in docs/where_it_helps/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import where_it_helps

from fastokd.recipe.names import Recipe
from fastokd.report.statistics import Paired, Sample, holm, paired


@dataclass(frozen=True)
class Row:
    """The runs of a row of a setting, by seed."""

    name: str
    runs: dict[int, dict[str, Any]]

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(next(iter(self.runs.values()))["recipe"])

    @property
    def group(self) -> bool:
        return self.name not in where_it_helps.ALONE

    def sample(self, of: str = "top1") -> Sample:
        return Sample.of([100 * run[of] for run in self.runs.values()])

    def paired(self, other: Row) -> Paired:
        return paired(*([100 * one[seed]["top1"] for seed in self.runs] for one in (self.runs, other.runs)))


@dataclass(frozen=True)
class Found:
    """A setting's rows, and the lone network of the best number of epochs."""

    name: str
    rows: tuple[Row, ...]

    @property
    def same(self) -> Row:
        return next(row for row in self.rows if row.name == "alone")

    @property
    def best(self) -> Row:
        """By its mean on the test images, which favours the lone network."""
        return max((row for row in self.rows if not row.group), key=lambda row: row.sample().mean)

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if row.group]


def read_all() -> list[Found]:
    """The settings whose rows all have every seed."""
    found = []
    for name, setting in where_it_helps.SETTINGS.items():
        of: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in setting.rows}
        for run in sorted(where_it_helps.read(name), key=lambda run: run["seed"]):
            if run["seed"] in setting.seeds and run["row"] in of:
                of[run["row"]][run["seed"]] = run
        rows = tuple(Row(row, runs) for row, runs in of.items() if len(runs) == len(setting.seeds))
        if len(rows) == len(of):
            found.append(Found(name, rows))
    return found


@dataclass(frozen=True)
class Judged:
    """A difference from a lone network; ``p`` is Holm's over all differences of the page's first part."""

    paired: Paired
    p: float

    @property
    def clear(self) -> int:
        """1 for better, -1 for worse, 0 where chance may be the reason."""
        return 0 if self.p >= 0.05 else 1 if self.paired.difference.value > 0 else -1

    def __str__(self) -> str:
        return f"{self.paired.difference}{'' if self.clear else ' (not clear)'}"


# By setting and method: from the lone network of the same epochs, and from the best one.
Verdicts = dict[tuple[str, str], tuple[Judged, Judged]]


def judged(settings: Sequence[Found]) -> Verdicts:
    """Every method of every setting. Where the network of the same epochs is the best, there is one test."""
    pairs = {
        (one.name, row.name, other.name): row.paired(other)
        for one in settings
        for row in one.methods
        for other in (one.same, one.best)
    }
    corrected = holm([1.0 if pair.p is None else pair.p for pair in pairs.values()])
    of = {names: Judged(pair, p) for (names, pair), p in zip(pairs.items(), corrected, strict=True)}
    return {
        (one.name, row.name): (
            of[one.name, row.name, one.same.name],
            of[one.name, row.name, one.best.name],
        )
        for one in settings
        for row in one.methods
    }


def section(settings: Sequence[Found]) -> list[str]:
    """Paragraphs and tables in Markdown."""
    of = judged(settings)
    parts = [
        "## Where distillation helps, and where it doesn't",
        "\n".join(_sentence(one, of) for one in settings),
        "Differences are in points of test top-1 from the same network trained alone, with 95% intervals of a paired t test\n"
        f"over {len(where_it_helps.SEEDS)} seeds, or as many as are said. *Better* and *worse* mean p < 0.05 after Holm's\n"
        "correction for all differences of this part (the intervals are without it): each method of each setting from alone\n"
        "for the same epochs, and from the best of alone for half, the same or twice the epochs (twice costs a lone network\n"
        "what a group of two costs). The best is chosen on the test images, which favours the lone network. A pair shares the\n"
        "seed, which draws the images, the wrong labels and the initial weights. Settings and methods were chosen by seeds 10\n"
        "to 19 (and, for the 20 other seeds, by the five before them); the claims are of others. Accuracies are of the last\n"
        "epoch on the whole test set.",
        "Also tried, with one or two seeds each: 250 digits, 60% of wrong labels, 1,020 images of Fashion-MNIST with 40% of\n"
        "wrong labels (30 epochs: alone 73.4, dml@2 73.3), 255 of its images (150 epochs: alone 75.2, dml@2 74.6,\n"
        "okddip-branch 75.5; alone for 300: 78.2), 1,900 glyphs, and the methods CL-ILR and PCL. On ten of the 20 other seeds\n"
        "(the even ones) okddip-network differed by +0.72 [-0.10, +1.54] from alone.",
    ]
    for one in settings:
        parts += [f"### {where_it_helps.SETTINGS[one.name].title}", _table(one, of)]
    where = next(iter(settings[0].rows[0].runs.values()))
    parts.append(
        "measured-cpu on "
        f"{where['environment']['cpu']}, {where['threads']} thread per run, two runs at a time beside other\n"
        f"programs, {where['environment']['precision']}, torch {where['environment']['torch']}. Seconds are of "
        "training. Each run's recipe and metrics are in\n`docs/where_it_helps/`; "
        "`python docs/where_it_helps.py` trains those that are missing."
    )
    return parts


def _sentence(one: Found, of: Verdicts) -> str:
    setting = where_it_helps.SETTINGS[one.name]
    said: dict[str, list[str]] = {}
    for row in sorted(one.methods, key=lambda row: -row.sample().mean):
        same, best = of[one.name, row.name]
        text = f"{row.name} {same.paired.difference}"
        if min(same.clear, best.clear) == 1:
            said.setdefault("better than alone for any of the three lengths", []).append(text)
        elif same.clear == 1:
            short = "better than alone for the same epochs, but not than the best alone"
            said.setdefault(short, []).append(f"{text}, from the best {best}")
        else:
            what = "worse than alone" if same.clear == -1 else "no clear difference from alone"
            said.setdefault(what, []).append(text)
    verdicts = "; ".join(f"{what}: {', '.join(texts)}" for what, texts in said.items())
    return (
        f"- **{setting.title}** ({setting.model}, {setting.epochs} epochs, alone {one.same.sample()}, best alone "
        f"{one.best.sample()} after {one.best.recipe.epochs}): {verdicts}."
    )


def _table(one: Found, of: Verdicts) -> str:
    lines = [
        "| row | networks | epochs | reported | test top-1 (%) | from alone, same epochs | p (Holm) | from the best alone "
        "| p (Holm) | ensemble (%) | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in one.rows:
        recipe, seconds = row.recipe, [run["seconds"] for run in row.runs.values()]
        cells = [row.name, recipe.students, recipe.epochs, recipe.reported, row.sample()]
        for verdict in of.get((one.name, row.name), ()):
            cells += [verdict.paired.difference, "<0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}"]
        cells += [""] * (9 - len(cells))
        cells += [row.sample("ensemble_top1") if row.group else "", f"{Sample.of(seconds).mean:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
