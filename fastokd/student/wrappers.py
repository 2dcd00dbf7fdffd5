"""Finds a network's state in that of modules that wrap it: DataParallel, FSDP, torch.compile, averages
of weights, and the modules of trainers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from torch import Tensor

from fastokd.errors import UserError
from fastokd.host.names import first_names

_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)")
# Wrappers of a network, which prefix all keys,
_AROUND = ("module", "model", "net", "network", "_orig_mod", "_forward_module")
# and wrappers of a submodule.
_WITHIN = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Names of what a trainer's module holds beside its network.
_BESIDE = re.compile(
    r"n_averaged|(.*_)?(criterion|loss|metrics?|acc|accuracy|train|val|test|ema)(_.*)?"
)
# The most wrappers around a network.
_DEEP = 4


def models_own(
    path: Path, places: Collection[str], is_usual: Callable[[str], bool]
) -> tuple[str, list[str]]:
    """Which of ``places`` has the model's own weights, and notes for the user.

    Raises:
        UserError: several aren't averages, and not exactly one ``is_usual``.
    """
    trained = [place for place in places if not _AVERAGE.search(place)] or list(places)
    usual = [place for place in trained if is_usual(place)] or trained
    if len(usual) > 1 and "" not in usual:
        raise UserError(
            f"{path} holds several state dicts, {', '.join(usual)}, and doesn't say which is the "
            "model's: save the one that you mean in a file of its own"
        )
    own = "" if "" in usual else usual[0]
    return own, _averages(path, (place for place in places if place != own), own)


def _averages(path: Path, others: Iterable[str], own: str) -> list[str]:
    averages = [place for place in others if _AVERAGE.search(place)]
    taken = own or "what stands outside it"
    note = f"{path} holds an average too, {', '.join(averages)}: {taken} is taken"
    return [note] if averages else []


def _without_inner(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the names of submodules' wrappers from the keys."""
    return {_WITHIN.sub("", key): value for key, value in weights.items()}


def unwrapped(path: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The entries without wrappers' prefixes, and notes for the user."""
    plain = _without_inner(weights)
    notes: list[str] = []
    while True:
        heads = dict.fromkeys(key.partition(".")[0] for key in plain)
        around = [h for h in heads if h in _AROUND and h not in plain]
        beside = [h for h in heads if h not in around and _BESIDE.fullmatch(h)]
        if len(around) != 1 or len(heads) != 1 + len(beside):
            return plain, notes
        (head,) = around
        notes += _averages(path, (h for h in beside if h not in plain), head)
        plain = {
            k.removeprefix(f"{head}."): v for k, v in plain.items() if k.startswith(f"{head}.")
        }


def network_in(
    path: Path, weights: dict[str, Tensor], is_network: Callable[..., bool]
) -> tuple[dict[str, Tensor], list[str]]:
    """The entries under a prefix whose keys are exactly a network's, without the prefix, and notes for
    the user; all entries if there is no such prefix.

    Args:
        is_network: takes keys, and ``whole``: whether they are all keys of the file.
    """
    plain = _without_inner(weights)
    under: dict[str, dict[str, Tensor]] = {"": plain}
    for key, value in plain.items():
        end = -1
        for _ in range(_DEEP):
            end = key.find(".", end + 1)
            if end < 0:
                break
            under.setdefault(key[: end + 1], {})[key[end + 1 :]] = value
    found = [at for at, own in under.items() if is_network(own, whole=len(own) == len(plain))]
    if not found or "" in found:
        return plain, []
    under[""] = {key: value for key, value in plain.items() if not key.startswith(tuple(found))}
    if is_network(under[""], whole=False):
        found.append("")
    at, notes = models_own(path, found, lambda at: {*at[:-1].split(".")} <= {*_AROUND})
    beside = [key for key in plain if not key.startswith(tuple(found))]
    if beside:
        notes.append(f"left out, as beside the network: {first_names(beside, 3)}")
    return under[at], notes
