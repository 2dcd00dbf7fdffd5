"""The classes of a teacher that a data set has, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastokd.errors import UserError
from fastokd.host.names import counted, first_names
from fastokd.models.pretrained import imagenet_classes, imagenet_synonyms

SHOWN = 3
# A class of ImageNet by its id in WordNet. The classes of published weights are in the order of the ids.
WNID = re.compile(r"n\d{8}")


def places_of(ours: Sequence[str], theirs: Sequence[str], teacher: str, data: str) -> list[int]:
    """The place among the teacher's classes ``theirs`` of each of the data set's.

    Names are compared exactly, then without regard to case, spaces, hyphens and underscores. Those of
    ImageNet's 1,000 classes may also be WordNet's ids and words.

    Raises:
        UserError: the teacher lacks a class, or two names are one class.
    """
    if list(ours) == list(theirs):
        return list(range(len(ours)))
    is_imagenet = len(theirs) == 1000 and list(theirs) == imagenet_classes()
    if is_imagenet and len(ours) == 1000 and all(map(WNID.fullmatch, ours)):
        in_order = {name: place for place, name in enumerate(sorted(ours))}
        return [in_order[name] for name in ours]
    names: list[set[str]] = [{name} for name in theirs]
    exact = _by_name(names)
    if is_imagenet:
        also = imagenet_synonyms()
        names = [one | more for one, more in zip(names, also, strict=True)] if also else names
    loose = _by_name({_plain(name) for name in one} for one in names)
    found = [exact.get(name, loose.get(_plain(name), set())) for name in ours]
    lacking = [name for name, places in zip(ours, found, strict=True) if not places]
    if lacking:
        raise UserError(
            f"the teacher {teacher}, with {counted(len(theirs), 'class')}, lacks {len(lacking)} "
            f"of {data}'s {len(ours)} ({first_names(lacking, SHOWN)}): train one on {data}, or name the "
            "folders as it names its classes"
        )
    for name, places in zip(ours, found, strict=True):
        if len(places) > 1:
            which = " and ".join(repr(theirs[place]) for place in sorted(places)[:2])
            raise UserError(
                f"the class {name!r} of {data} may be {which} of the teacher {teacher}: name it as one "
                "of them"
            )
    only = [min(places) for places in found]
    for index, place in enumerate(only):
        if place in only[:index]:
            pair = f"{ours[only.index(place)]!r} and {ours[index]!r}"
            raise UserError(
                f"{pair} of {data} are one class, {theirs[place]!r}, of the teacher {teacher}: name "
                "another teacher"
            )
    return only


def _by_name(names: Iterable[Iterable[str]]) -> dict[str, set[int]]:
    """The places of each name."""
    found: dict[str, set[int]] = {}
    for place, several in enumerate(names):
        for name in several:
            found.setdefault(name, set()).add(place)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
