"""The settings in which many runs differ, and a form that filters by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastokd.host.names import in_html, on_a_line
from fastokd.report.charts import in_script
from fastokd.report.published import Changes, from_its_name, options_of
from fastokd.run.folder import Run

# A value for each run; None where it has no such setting.
Fields = Mapping[str, Sequence[Any]]
# They come first, and aren't left out where a recipe's name implies them.
FIRST = (
    *("method", "sharing", "model", "dataset", "students", "seed", "label_noise", "fraction"),
    *("epochs", "batch_size", "lr"),
)


def varying(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which these runs differ: what their recipes' names say, the seed, and all that a user
    changed, as fields, options of method and student, and the run's options.

    Settings that follow from another method's or data set's recipe, such as its schedule, are no choice and
    left out, but those of :data:`FIRST`.
    """
    of_recipes: dict[str, Changes] = {}  # the seeds have them in common
    changes = []
    for run in runs:
        key = repr({**vars(run.recipe), "seed": 0})
        if key not in of_recipes:
            of_recipes[key] = from_its_name(run.recipe)
        changes.append(of_recipes[key] | options_of(run))
    names = dict.fromkeys([*FIRST, *(name for one in changes for name in one)])
    found = {
        name: [_value(run, one, name) for run, one in zip(runs, changes, strict=True)]
        for name in names
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _value(run: Run, changes: Changes, name: str) -> Any:
    recipe = run.recipe
    known = {**vars(recipe), **recipe.model_options, **recipe.method_options}
    value = known.get(name, changes.get(name, (None, None))[0])
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, (int, float, str)) or value is None else str(value)


def said(value: Any) -> str:
    """A value as text, as in ``--set``; "none" where there is none."""
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else on_a_line(value)


def ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers in their order, words as they come, none at the end."""
    once = list(dict.fromkeys(value for value in values if value is not None))
    if all(isinstance(value, (int, float)) for value in once):
        once.sort()
    return [*once, None] if None in values else once


def filter_form(fields: Fields, names: Sequence[str]) -> str:
    """A form of the tables and charts in its section: a choice for each field, and words to be found in a
    run's fields or its name (``names``). Without JavaScript it stays hidden."""
    choices = "".join(
        f'<label>{in_html(name)} <select name="{in_html(name)}"><option value="">all</option>'
        f"{''.join(f'<option>{in_html(said(value))}</option>' for value in ordered(values))}"
        "</select></label>"
        for name, values in fields.items()
    )
    runs = [
        {"run": on_a_line(run), **{name: said(values[i]) for name, values in fields.items()}}
        for i, run in enumerate(names)
    ]
    return (
        '<form class="filter" role="search" aria-label="Filter the runs" hidden>'
        f'{choices}<label>words <input type="search" placeholder="seed=1"></label>'
        f'<button type="reset">show all</button><output aria-live="polite">{len(names)} of {len(names)} runs</output>'
        f'<script type="application/json">{in_script(runs)}</script></form>'
    )
