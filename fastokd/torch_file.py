"""Files that ``torch.save`` wrote, of whatever origin; reading one runs no code.

A state dict may be the file or stand in a whole training state, under wrappers' prefixes:
:func:`state_dict_in` finds it for every reader.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import UserError


class _Unread:
    """Stands for a value that a training state holds beside the weights; takes what the file gives
    it, and keeps none of it."""

    def __new__(cls, *_: Any) -> _Unread:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Dictionary:
    """Stands for a class of dictionaries."""

    def __new__(cls, *_: Any) -> Any:
        return {}


_NUMPY = [
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "bool_", "str_")),
    *(f"numpy.{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)
      if (kind, bits) != ("float", 8)),
]  # fmt: skip
_PATHS = [
    f"{module}.{pure}{kind}Path"
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for kind in ("", "Posix", "Windows")
]
_LIGHTNING = [
    f"{package}.AttributeDict"
    for package in (
        "pytorch_lightning.utilities.parsing",
        "lightning.pytorch.utilities.parsing",
        "lightning_fabric.utilities.data",
        "lightning.fabric.utilities.data",
    )
]
_TYPES = [
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("int", "float", "bool", "str", "list", "dict", "tuple")),
    "datetime.datetime",
    "datetime.timedelta",
    "types.SimpleNamespace",
    "torch.torch_version.TorchVersion",
]  # fmt: skip
# What else training states hold. The file's names are never looked up: NumPy's own code isn't called
# with what a file says.
_STANDS_FOR: list[Any] = [
    argparse.Namespace,
    *((_Unread, name) for name in (*_NUMPY, *_PATHS, *_TYPES)),
    *((_Dictionary, name) for name in ("collections.defaultdict", *_LIGHTNING)),
]

# Where trainers put a model's state dict within their checkpoint.
PLACES = (
    "state_dict",
    "model",
    "weight",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "net_state_dict",
)
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)")
_NO_MODEL = re.compile(r"optim|sched|scaler|criterion|loss|metric|config|args|hyper|hparam|rng")
# Modules that wrap a network: their names stand before all of its keys,
_AROUND = ("module", "model", "net", "network", "_orig_mod", "_forward_module")
# or, where a part of it was wrapped, within.
_WITHIN = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What a trainer's module has beside its network.
_BESIDE = re.compile(
    r"(criterion|loss|metric|train|val|test|ema|n_averaged)|.*(_ema|_loss|_metrics?)$"
)


@dataclass(frozen=True)
class StateDict:
    """One network's weights in a file.

    Attributes:
        weights: under the network's own keys.
        place: where in the file they stand; "" for the file itself.
        beside: all that the file holds.
        notes: what a user should know of the choice, a sentence each.
    """

    weights: dict[str, Tensor]
    place: str
    beside: dict[Any, Any]
    notes: tuple[str, ...] = ()


def state_dict_in(path: Path) -> StateDict:
    """The state dict that a file is, or holds.

    Of a model and its average the model's is taken. The prefixes of DataParallel, torch.compile,
    AveragedModel and of a trainer's module are taken off.

    Raises:
        UserError: as :func:`unpickled`; there is no state dict, or there are several and none is
            the model's; an entry is no plain tensor.
    """
    content = unpickled(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
    found = dict(_state_dicts(content))
    if not found:
        raise UserError(f"{path} holds no state dict: it has {_some(content)}")
    trained = [place for place in found if not _AVERAGE.search(place)] or list(found)
    named = [place for place in trained if place.rpartition(".")[2] in PLACES] or trained
    if len(named) > 1:
        raise UserError(
            f"{path} holds several state dicts, {', '.join(named)}, and doesn't say which is the "
            "model's: save the one that you mean in a file of its own"
        )
    place = named[0]
    for key, value in found[place].items():
        if not is_plain(key, value):
            raise UserError(f"{path} has {key!r} among its weights, which is no plain tensor")
    averages = [other for other in found if other != place and _AVERAGE.search(other)]
    notes = [f"{path} holds an average too, {', '.join(averages)}: {place} is taken"]
    return StateDict(_unwrapped(found[place]), place, content, tuple(notes if averages else ()))


def _state_dicts(content: dict[Any, Any], at: str = "", deep: int = 3) -> Iterator[tuple[str, Any]]:
    """Every state dict and its place: a mapping with tensors, and no mapping, in it."""
    if not any(isinstance(value, dict) for value in content.values()):
        if any(isinstance(value, Tensor) for value in content.values()):
            yield at, content
        return
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and deep and not _NO_MODEL.search(key):
            yield from _state_dicts(value, f"{at}.{key}" if at else key, deep - 1)


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the keys of the network within all wrappers."""
    plain = {_WITHIN.sub("", key): value for key, value in weights.items()}
    while True:
        heads = {key.partition(".")[0] for key in plain}
        around = [h for h in heads if h in _AROUND and h not in plain]
        beside = [h for h in heads if h not in around and _BESIDE.fullmatch(h)]
        if len(around) != 1 or len(heads) != 1 + len(beside):
            return plain
        (head,) = around
        plain = {
            k.removeprefix(f"{head}."): v for k, v in plain.items() if k.startswith(f"{head}.")
        }


def _some(content: dict[Any, Any]) -> str:
    names = [repr(key) for key in content]
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        or "nothing"
    )


def unpickled(path: Path) -> Any:
    """The file's content, built of tensors and plain values alone; what else training states hold
    beside them (NumPy's numbers, paths, dates) is there without its value.

    Raises:
        UserError: it can't be read, holds anything else, or unpacks to more than it holds.
    """
    _refuse_a_bomb(path)
    try:
        with torch.serialization.safe_globals(_STANDS_FOR), warnings.catch_warnings():
            # Of pickle protocols that these files weren't written with.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if "Unsupported operand" in str(error):
            raise UserError(
                f"{path} is no checkpoint of torch, or is damaged, or was written with another "
                "pickle protocol than torch's: save it again by torch.save without pickle_protocol"
            ) from error
        if found is None:
            raise UserError(f"{path} is no checkpoint of torch, or is damaged") from error
        raise UserError(
            f"{path} is refused: beside tensors and plain values it holds {found.group(1)}, which "
            "could run code; save its state dict alone where you trust it"
        ) from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:
        # A damaged file can make the unpickler raise anything.
        raise UserError(f"{path} is no checkpoint of torch, or is damaged: {error!r}") from error


def is_plain(key: Any, value: Any) -> bool:
    """Whether this is an entry of a state dict: a name, and a tensor with values of its own."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(key, str) and plain and not value.is_meta and not value.is_quantized


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _refuse_a_bomb(path: Path) -> None:
    """torch stores what it zips as it is; members that unpack to more are nobody's weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        if not _is_zip(path):
            return  # of torch's old format, or no checkpoint: the reader says so
        # torch's reader of zips is another: what this one can't look through isn't given to it.
        raise UserError(f"{path} is no checkpoint of torch, or is damaged: {error!r}") from error
    if any(member.compress_type for member in members) or (
        sum(member.file_size for member in members) > path.stat().st_size
    ):
        raise UserError(
            f"{path} is refused: it unpacks to more than it holds, which no checkpoint of torch does"
        )
