"""Files written by ``torch.save``, of any origin; reading one runs no code.

A state dict may be the file or stand in a whole training state, under wrappers' prefixes:
:func:`state_dict_in` finds it for every reader.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastokd.errors import UserError
from fastokd.host.names import first_names
from fastokd.student.stand_ins import Unread, stand_ins, strangers
from fastokd.student.wrappers import models_own, unwrapped

# Where trainers put a model's state dict within their checkpoint.
PLACES = (
    *("state_dict", "model", "weight", "model_state_dict"),
    *("model_state", "net", "network", "net_state_dict"),
)
_NO_MODEL = re.compile(r"optim|sched|scaler|criterion|loss|metric|config|args|hyper|hparam|rng")


@dataclass(frozen=True)
class StateDict:
    """One network's weights in a file.

    Attributes:
        weights: under the network's own keys.
        place: their key in the file; "" for the file itself.
        beside: the whole content of the file.
        notes: notes for the user, a sentence each.
    """

    weights: dict[str, Tensor]
    place: str
    beside: dict[Any, Any]
    notes: tuple[str, ...] = ()


def state_dict_in(path: Path) -> StateDict:
    """The model's state dict in a file.

    A model is preferred to its average. Prefixes of DataParallel, torch.compile, AveragedModel and
    trainers' modules are removed.

    Raises:
        UserError: as :func:`unpickled`; there is no state dict, or it can't be determined which of
            several is the model's; an entry isn't a plain tensor.
    """
    content = unpickled(path)
    if not isinstance(content, dict):
        why = ", which could run code: save its state_dict()" if isinstance(content, Unread) else ""
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}{why}")
    found = dict(_state_dicts(content))
    if not found:
        raise UserError(f"{path} holds no state dict: it has {_some(content)}{_unread(content)}")
    place, notes = models_own(path, found, lambda place: place.rpartition(".")[2] in PLACES)
    # Numbers and options of a trainer have no dot in their names.
    entries = {
        key: value
        for key, value in found[place].items()
        if isinstance(value, Tensor) or (isinstance(key, str) and "." in key)
    }
    for key, value in entries.items():
        if not is_plain(key, value):
            raise UserError(f"{path} has {key!r} among its weights, which is no plain tensor")
    weights, within = unwrapped(path, entries)
    return StateDict(weights, place, content, (*notes, *within))


def _state_dicts(content: dict[Any, Any], at: str = "", deep: int = 3) -> Iterator[tuple[str, Any]]:
    """Every state dict and its place: a mapping with tensors. If it also holds mappings, a tensor must
    have a dotted name."""
    tensors = [key for key, value in content.items() if isinstance(value, Tensor)]
    nested = any(isinstance(value, dict) for value in content.values())
    if tensors and not (nested and all("." not in str(k) or _NO_MODEL.search(k) for k in tensors)):
        yield at, content
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and deep and not _NO_MODEL.search(key):
            yield from _state_dicts(value, f"{at}.{key}" if at else key, deep - 1)


def _some(content: dict[Any, Any]) -> str:
    return first_names([repr(key) for key in content], 5) or "nothing"


def _unread(content: dict[Any, Any], deep: int = 1) -> str:
    """Why weights may be missed: the first value that wasn't read."""
    for key, value in content.items():
        if isinstance(value, Unread):
            name = type(value).__name__
            if name.startswith("numpy.") and not name.endswith(".scalar"):
                return f"; {key!r} is a NumPy array: save each as a tensor, by torch.from_numpy"
            return f"; {key!r} is a {name}, which could run code: save its state_dict() instead"
        if isinstance(value, dict) and deep and (found := _unread(value, deep - 1)):
            return found
    return ""


def unpickled(path: Path) -> Any:
    """The file's content. Tensors and plain values are read; other objects (NumPy's numbers, paths,
    dates, any class) become placeholders without a value, and the file's names are never imported. A
    safetensors file under another name is read too.

    Raises:
        UserError: it can't be read, or is a zip bomb.
    """
    refuse_what_is_none(path)
    _refuse_a_bomb(path)
    kinds = stand_ins(_pickles(path))
    # A trainer's options are read, since they may name the model and the data set.
    known: list[Any] = [argparse.Namespace, *((kind, name) for name, kind in kinds.items())]
    try:
        if is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            # A warning about pickle protocols that these files don't use.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, TypeError, AttributeError) as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if "Unsupported operand" in str(error):
            raise UserError(
                f"{path} is no checkpoint of torch, or is damaged, or was written with another "
                "pickle protocol than torch's: save it again by torch.save without pickle_protocol"
            ) from error
        names = [found.group(1)] if found else strangers(kinds)
        if not names:
            raise UserError(f"{path} is no checkpoint of torch, or is damaged") from error
        raise UserError(
            f"{path} is refused: beside tensors and plain values it holds {first_names(names, 5)}, which "
            "could run code; save its state dict alone where you trust it"
        ) from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:
        # The unpickler may raise any exception for a damaged file.
        raise UserError(f"{path} is no checkpoint of torch, or is damaged: {error!r}") from error


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """The pickles in a file of torch, each at its start."""
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    yield io.BytesIO(archive.read(name))
    else:
        with open(path, "rb") as file:
            for _ in range(4):  # the old format's number, version and machine, and the content
                yield file


def is_plain(key: Any, value: Any) -> bool:
    """Whether this is an entry of a state dict: a name, and a dense tensor with values."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(key, str) and plain and not value.is_meta and not value.is_quantized


def is_safetensors(path: Path) -> bool:
    """Whether the file's content begins like safetensors; its name isn't checked."""
    begins = _begins(path)
    size = int.from_bytes(begins[:8], "little")
    return begins[8:9] == b"{" and size + 8 <= path.stat().st_size


def refuse_what_is_none(path: Path) -> None:
    """Refuses a file that was downloaded in place of the weights.

    Raises:
        UserError: it is a pointer to the file, or a web page.
    """
    begins = _begins(path).lstrip().lower()
    if begins.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-LFS pointer in place of the file: get it by git lfs pull")
    if begins.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page in place of the file: download the file itself")


def _begins(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(100)
    except OSError:
        return b""


def _is_zip(path: Path) -> bool:
    return _begins(path).startswith(b"PK\x03\x04")


def _refuse_a_bomb(path: Path) -> None:
    """Refuses zip bombs: torch stores its members uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        if not _is_zip(path):
            return  # of torch's old format, or no checkpoint: the reader says so
        # torch has its own zip reader: a file that zipfile can't check isn't passed to it.
        raise UserError(f"{path} is no checkpoint of torch, or is damaged: {error!r}") from error
    if any(re.fullmatch(r"[^/]+/constants\.pkl", member.filename) for member in members):
        raise UserError(
            f"{path} is a TorchScript archive, whose code isn't run: save its state_dict() by "
            "torch.save"
        )
    if any(member.compress_type for member in members) or (
        sum(member.file_size for member in members) > path.stat().st_size
    ):
        raise UserError(
            f"{path} is refused: it unpacks to more than it holds, which no checkpoint of torch does"
        )
