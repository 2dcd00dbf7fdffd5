"""Placeholder classes for the names in a pickle, so that torch's safe reader reads the rest.

torch's reader calls only functions that it knows or was given. It is given an inert class for every
other name, so that none of the file's names is imported and no code runs.
"""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable
from typing import IO, Any


class Unread:
    """Placeholder for a value that isn't read: accepts any arguments and state, and keeps nothing.
    Each type in the file has its own subclass of the same name."""

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Dictionary(Unread):
    """Placeholder for a class of dictionaries, whose entries are read."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _List(Unread):
    """Placeholder for a class that is filled like a list."""

    def __new__(cls, *_: Any) -> Any:
        return []


_FILLED_AS = {"APPEND": _List, "APPENDS": _List, "SETITEM": _Dictionary, "SETITEMS": _Dictionary}
# Read as it is, for its options.
_READ = ("argparse.Namespace",)
# A limit far above what training states name; more would slow down torch's reader.
MOST_NAMES = 200
# Names in every file of tensors.
_TORCHS = re.compile(
    r"torch\.(\w+|(_utils|_tensor)\.\w+|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode"
)


def stand_ins(pickles: Iterable[IO[bytes]]) -> dict[str, type]:
    """A class for every type and function that the pickles name; none if a pickle can't be parsed or
    names too many. torch's reader prefers its own types, and raises on names that have no class."""
    kinds: dict[str, type] = {}
    try:
        for file in pickles:
            _look_through(file, kinds)
    except Exception:  # torch's reader reports the error
        return {}
    if len(kinds) > MOST_NAMES:
        return {}
    # torch knows some of Python 2's names by those of Python 3: each is given under both.
    made = {name: type(_name_now(name), (kind,), {}) for name, kind in kinds.items()}
    both = made | {kind.__name__: kind for kind in made.values()}
    return {name: kind for name, kind in both.items() if name not in _READ}


def _name_now(name: str) -> str:
    """The Python 3 name of a Python 2 ``name``."""
    module, _, attribute = name.rpartition(".")
    renamed = (IMPORT_MAPPING.get(module, module), attribute)
    return ".".join(NAME_MAPPING.get((module, attribute), renamed))


def strangers(kinds: dict[str, type]) -> list[str]:
    """The names of ``kinds`` that aren't torch's own types for tensors."""
    names = dict.fromkeys(kind.__name__ for kind in kinds.values())
    return [name for name in names if not _TORCHS.fullmatch(name)]


def _look_through(file: IO[bytes], kinds: dict[str, type]) -> None:
    """Adds one pickle's names and how their objects are filled. Emulates the unpickler's stack with
    names in place of objects."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name, before = opcode.name, opcode.stack_before
        if name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            stack.append(f"{module}.{attribute}")
            if re.fullmatch(r"[\w.]+", stack[-1]):
                kinds.setdefault(stack[-1], Unread)
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(pickletools.markobject)
        else:
            if pickletools.markobject in before:
                while stack.pop() is not pickletools.markobject:
                    pass
                before = before[: before.index(pickletools.markobject)]
            taken = [stack.pop() for _ in before]
            if name in _FILLED_AS and taken[-1] in kinds:
                kinds[taken[-1]] = _FILLED_AS[name]
            same = name in (*_FILLED_AS, "REDUCE", "NEWOBJ", "BUILD")
            stack += [taken[-1]] if same else [None] * len(opcode.stack_after)
