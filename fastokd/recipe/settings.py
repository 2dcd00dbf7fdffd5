"""The runs that a command line asks for: flags, ``--set`` and ``--seeds`` merged into recipes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastokd.errors import UserError
from fastokd.recipe.changes import NAMED, option
from fastokd.recipe.file import label
from fastokd.recipe.names import Recipe, recipe

# The settings that are learning rates.
RATES = ("lr", "head_lr", "warmup_lr", "final_lr")
# Python's words, which JSON writes otherwise.
PYTHON = {"True": True, "False": False}


@dataclass(frozen=True)
class WantedRun:
    """A run that was asked for: its folder's name, its recipe, and the settings that name it."""

    folder: str
    recipe: Recipe
    settings: Mapping[str, Any]


def parse_settings(texts: Iterable[str]) -> dict[str, list[Any]]:
    """``["lr=0.1,0.05", "mix=logits,probs"]`` as lists of values.

    Values are JSON (numbers, true, ``[10,15]``) or, where one isn't, words.

    Raises:
        UserError: a text of another form; a setting that is named twice or can't be set.
    """
    settings: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UserError(f"--set is {text!r}: write KEY=VALUE or KEY=VALUE,VALUE")
        if key in NAMED:
            raise UserError(f"--set can't change {key}: a recipe's name says it, name another")
        try:
            parsed = json.loads(f"[{values}]")
        except ValueError:
            parsed = [PYTHON.get(word, word) for word in values.split(",")]
        if settings.setdefault(key, parsed) != parsed:
            raise UserError(
                f"--set gives {key} twice, {_list(settings[key])} and {values}: leave one of them out, "
                f"or write {key}=VALUE,VALUE for several runs"
            )
    return settings


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers, without repetitions."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--seeds is {text!r}: write whole numbers, such as 0,1,2")
    return list(dict.fromkeys(int(word) for word in words))


def wanted_runs(
    name: str,
    flags: Mapping[str, Any],
    settings: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] | None = None,
    scale_lr: bool = False,
) -> list[WantedRun]:
    """A run for every combination of the settings' values and the seeds.

    Args:
        name: the recipe's.
        flags: the value of each setting, or None if the flag wasn't given.
        settings: the result of :func:`parse_settings`. Their values are in the folders' names.
        seeds: the values of ``--seeds``.
        scale_lr: multiply each run's learning rates by its batch size over the named recipe's batch
            size: Goyal et al.'s rule (arXiv 1706.02677). It applies to the recipe's SGD; a method's
            own Adam keeps its rate.

    Raises:
        UserError: a setting with two different values; errors of :func:`fastokd.recipe`.
    """
    said = {key: value for key, value in flags.items() if value is not None}
    if seeds is not None and "seed" in said:
        raise UserError("--seed and --seeds say the same thing: give one of them")
    for key, values in settings.items():
        both = (
            [seeds] if key == "seed" and seeds is not None else [[said[key]]] if key in said else []
        )
        for others in both:
            if list(others) != list(values):
                flag = option("seeds" if others is seeds else key)
                raise UserError(
                    f"{key} is {_list(others)} by {flag} and {_list(values)} by --set: leave one of "
                    "them out"
                )
    every_seed = settings.get("seed") or seeds or [said.get("seed")]  # None: the recipe's own
    swept = {key: values for key, values in settings.items() if key != "seed"}
    wanted = []
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        words = [f"{key}={_word(value)}" for key, value in chosen.items()]
        for seed in every_seed:
            given = {} if seed is None else {"seed": seed}
            resolved = recipe(name, **{**said, **chosen, **given})
            settled = {**chosen, "seed": resolved.seed}
            if scale_lr:
                share = resolved.batch_size / recipe(name).batch_size
                scaled = {rate: share * getattr(resolved, rate) for rate in RATES}
                resolved = replace(resolved, **scaled)
                settled["lr"] = resolved.lr
            folder = "-".join([label(name), *words, f"seed{resolved.seed}"])
            wanted.append(WantedRun(folder, resolved, settled))
    return wanted


def _list(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "".join(letter if letter.isalnum() or letter in "._-,+" else "_" for letter in text)
