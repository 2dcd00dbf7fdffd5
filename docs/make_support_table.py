"""Writes the table of docs/methods.md that says what each method supports.

    python docs/make_support_table.py

Its cells are attempts (recipes, engines, students on two ranks, the loss of a batch and of its halves) and flags.
``tests/methods/test_support_table.py`` fails where the page differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.cohort import ENGINES, Cohort, CohortOutput
from fastokd.distributed.ranks import Line, Ranks
from fastokd.errors import UserError
from fastokd.learner.student_parallel import StudentParallel
from fastokd.methods import INDEX, Method, Progress, create_method, list_methods, method_class
from fastokd.recipe.names import Recipe, recipe

PAGE = Path(__file__).parent / "methods.md"
BEGIN, END = "<!-- make_support_table.py -->\n", "<!-- end -->\n"
HEAD = (
    *("method", "form", "engines", "parts of a batch", "data-parallel ranks"),
    *("students across ranks", "mixed labels", "a view each", "`plan`"),
)
# Options with other answers than their method's defaults.
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mcl", {"form": "memory"}),
    ("mcl", {"form": "okd"}),
    ("dml", {"divergence": "dkd"}),
    ("dml", {"divergence": "dist"}),
)
CLASSES, BATCH = 10, 8


@cache
def cohort_of(students: int, form: str, use: str) -> Cohort:
    """One for each ``use``; methods are made for it in turn."""
    del use
    torch.manual_seed(0)
    return Cohort(("resnet8", students), CLASSES, sharing=form, image_size=8).double()


class Case(NamedTuple):
    """A method in one of its forms."""

    name: str
    form: str
    options: dict[str, Any]

    def recipe(self, **settings: Any) -> Recipe:
        return recipe(f"{self.name}-{self.form}/resnet8/digits", **self.options, **settings)

    def made(self, use: str) -> tuple[Cohort, Method]:
        of = self.recipe()
        cohort = cohort_of(of.students, self.form, use)
        few = {"negatives": 4} if "form" in self.options else {}
        method = create_method(self.name, cohort.shape, **{**of.method_options, **few}).double()
        if method.needs.training_set:
            method.start(torch.arange(40) % CLASSES, torch.Generator().manual_seed(0))
        return cohort, method


def works(attempt: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
    try:
        attempt(*args, **kwargs)
    except UserError:
        return False
    return True


@cache
def engines_of(cohort: Cohort, companion: str) -> frozenset[str]:
    """``companion``: the name of the method whose companion the cohort has, or none."""
    del companion
    found = frozenset(engine for engine in ENGINES if works(cohort.set_engine, engine))
    cohort.set_engine("loop")
    return found


def parts_are_the_batch(cohort: Cohort, method: Method) -> bool:
    """Whether the loss of a batch is the mean of its halves', with norms by their running statistics."""
    cohort.eval()
    method.eval()
    cohort.training = method.needs.companion != "none"  # it runs in training alone
    images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
    labels_B = torch.tensor([0, 0, 1, 1] * (BATCH // 4))
    draws = method.draw(BATCH, torch.Generator().manual_seed(0))
    draws[INDEX] = torch.arange(BATCH)
    teacher_1BC = torch.randn(1, BATCH, CLASSES, dtype=torch.float64)

    @torch.no_grad()
    def loss(part: slice) -> Tensor:
        out: CohortOutput = cohort(images[part])
        if method.needs.teacher:
            out.extra_logits_EBC = teacher_1BC[:, part]
        progress = Progress.start()
        progress.draws = {name: value[part] for name, value in draws.items()}
        return method(out, labels_B[part], progress).total

    half = BATCH // 2
    halves = (loss(slice(half)) + loss(slice(half, BATCH))) / 2
    return torch.allclose(loss(slice(BATCH)), halves, rtol=1e-9)


def across_ranks(case: Case) -> bool:
    cohort, method = case.made("ranks")
    if method.needs.training_set:
        return False
    return works(StudentParallel, cohort, method, Ranks(students=Line(0, 2)), "fp32", case.name)


def row(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The cells after the method's name."""
    cases = {form: Case(name, form, options) for form in method_class(name).needs.sharing}
    engines: set[str] = {*ENGINES}
    exact = True
    for case in cases.values():
        cohort, method = case.made("loss")
        exact &= parts_are_the_batch(cohort, method)
        engines &= engines_of(cohort, "" if cohort.companion is None else name)
        memory, taught = method.needs.training_set, method.needs.teacher

    def each(attempt: Callable[[Case], bool]) -> str:
        """``yes``, ``no``, or in which forms."""
        forms = [form for form, case in cases.items() if attempt(case)]
        return "yes" if len(forms) == len(cases) else ", ".join(forms) or "no"

    def takes(**settings: Any) -> str:
        return each(lambda case: works(case.recipe, **settings))

    several = len(cohort.students) > 1
    return (
        " or ".join(sorted(cases)),
        "all" if engines == {*ENGINES} else ", ".join(sorted(engines)),
        "as in the whole" if exact else "each by itself",
        "no" if memory else "yes" if exact else "each by itself",
        each(across_ranks) if several else "one network",
        takes(mixup=0.2),
        takes(views="student") if several or taught else "one network",
        "no" if memory else "yes",
    )


def table() -> str:
    """Methods of equal cells share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, options in (*((name, {}) for name in list_methods()), *OPTIONS):
        label = "".join(f" `{key}={value}`" for key, value in options.items())
        rows.setdefault(row(name, options), []).append(f"`{name}`{label}")
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [(", ".join(names), *cells) for cells, names in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str) -> str:
    """The page with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
