"""Files that ``torch.save`` wrote, of whatever origin; reading one runs no code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import UserError


def unpickled(path: Path) -> Any:
    """The file's content, built of tensors and plain values alone.

    Raises:
        UserError: it can't be read, holds anything else, or unpacks to more than it holds.
    """
    _refuse_a_bomb(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of pickle protocols that these files weren't written with.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
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
