"""Checkpoints, which are written atomically.

A checkpoint is a folder: ``state.safetensors`` (every tensor), ``state.json`` (everything else)
and ``manifest.json`` (SHA-256 of both). It is written to a temporary folder, flushed and renamed, so
that a reader sees all of it or nothing. Loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fastokd.errors import DiskError, UserError, as_path, warn
from fastokd.known import Later

if TYPE_CHECKING:
    from torch import Tensor

# Imported when tensors are read or written: listing runs needs neither.
torch = Later("torch")
tensor_file = Later("safetensors.torch")

TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
# The kept student's file in a run folder.
STUDENT = "student.safetensors"


def write_durably(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` atomically."""
    beside = path.with_name(f".{path.name}.tmp{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _write_flushed(beside, data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises a :class:`DiskError` that names the run ``folder`` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"the run folder {folder} can't be written: {error}; files written before are intact"
        ) from error


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object of a run's folder; empty if there is no such file. ``what`` describes it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}): put it back or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no {what} of a run: put it back or remove it")
    return found


def sync_folder(folder: Path) -> None:
    """Flushes the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the folder ``path``; an existing one is replaced.

    Raises:
        OSError: the disk is full or can't be written; ``path`` is unchanged.
    """
    payload = {
        TENSORS: tensor_file.save(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        ),
        FACTS: json.dumps(facts, indent=1).encode(),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in payload.items()}
    payload[MANIFEST] = json.dumps(digests, indent=1).encode()
    with _beside(as_path("path", path)) as beside:
        for name, data in payload.items():
            _write_flushed(beside / name, data)


def link_checkpoint(source: Path, path: Path) -> None:
    """Makes ``path`` a copy of the checkpoint ``source`` by hard links; raises as
    :func:`save_checkpoint`."""
    with _beside(path) as beside:
        for name in (TENSORS, FACTS, MANIFEST):
            try:
                os.link(source / name, beside / name)
            except OSError:  # noqa: PERF203 (a file system without links)
                _write_flushed(beside / name, (source / name).read_bytes())


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``path`` afterwards; removed if the body raises."""
    beside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    away = path.with_name(f".{path.name}.old{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    if path.exists():
        shutil.rmtree(away, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        sync_folder(beside)
        if path.exists():
            os.rename(path, away)
        try:
            os.rename(beside, path)
        except OSError:
            if away.exists():
                os.rename(away, path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(away, ignore_errors=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of killed writers; no other process may write in ``folder``.

    A checkpoint that was moved away for one that wasn't finished is restored.
    """
    for path in folder.glob(".*.old*"):
        place = path.with_name(path.name[1:].rpartition(".old")[0])
        if path.is_dir() and not path.is_symlink() and not place.exists():
            path.rename(place)
    for path in [*folder.glob(".*.tmp*"), *folder.glob(".*.old*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint and checks its digests.

    Raises:
        UserError: it is missing, incomplete or altered; the message names the file.
    """
    path = as_path("path", path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        payload = {name: (path / name).read_bytes() for name in (TENSORS, FACTS)}
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise UserError(
            f"the checkpoint {path} is incomplete: {name} is missing; use an older one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    for name, data in payload.items():
        known = manifest.get(name) if isinstance(manifest, dict) else None
        if hashlib.sha256(data).hexdigest() != known:
            raise UserError(
                f"the checkpoint {path} is damaged: {name} isn't what was written; use an older one"
            )
    try:
        tensors, facts = tensor_file.load(payload[TENSORS]), json.loads(payload[FACTS])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(facts, dict):
        raise UserError(f"the checkpoint {path} isn't from a run: its {FACTS} holds no object")
    return tensors, _as_now(facts)


def read_facts(path: str | Path) -> dict[str, Any]:
    """A checkpoint's facts; its tensors aren't read.

    Raises:
        UserError: they are missing or altered.
    """
    path = as_path("path", path)
    try:
        manifest, facts = (json.loads((path / name).read_bytes()) for name in (MANIFEST, FACTS))
        digest = hashlib.sha256((path / FACTS).read_bytes()).hexdigest()
        if digest == manifest[FACTS] and isinstance(facts, dict):
            return _as_now(facts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    raise UserError(f"the checkpoint {path} is damaged: {FACTS} isn't what was written")


def _as_now(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts as this version writes them: the decay of an average was no setting of the recipe."""
    recipe, decay = facts.get("recipe"), facts.get("ema")
    if isinstance(recipe, dict) and decay is not None:
        recipe.setdefault("ema", decay)
    return facts


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the checkpoint {path} can't be read ({error}): use an older one")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values; doesn't depend on the order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def list_checkpoints(folder: str | Path, kind: str = "last") -> list[Path]:
    """The checkpoints ``kind-STEP`` in a run's ``checkpoints/``, newest first."""
    found = as_path("folder", folder).glob(f"{kind}-[0-9]*")
    return sorted(found, key=lambda path: path.name, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def newest_checkpoint(
    folder: str | Path,
) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]:
    """The newest complete checkpoint, and the faults of newer ones, each with a warning.

    Raises:
        UserError: none can be read; the message has the newest one's fault.
    """
    faults: list[str] = []
    for path in list_checkpoints(folder):
        try:
            tensors, facts = load_checkpoint(path)
        except UserError as error:  # noqa: PERF203
            faults.append(str(error))
        else:
            for fault in faults:
                warn(f"{fault} ({path.name} is used)")
            return path, tensors, facts, faults
    if faults:
        raise UserError(f"no checkpoint of {folder} can be used: {faults[0]}")
    if (Path(folder).parent / STUDENT).is_file():
        raise UserError(
            f"there is no checkpoint in {folder}: only the {STUDENT} of the run is left, which `fastokd "
            "export` and `fastokd predict` take"
        )
    raise UserError(
        f"there is no checkpoint in {folder}: the run never finished an epoch; remove the folder and start again"
    )


def run_checkpoint(path: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The checkpoint at ``path``, or the :func:`newest_checkpoint` of the run there.

    Raises:
        UserError: there is neither, or it can't be read.
    """
    path = as_path("path", path)
    if (path / "checkpoints").is_dir():
        return newest_checkpoint(path / "checkpoints")[:3]
    if not path.exists():
        raise UserError(
            f"there is no run or checkpoint at {path}: name a folder of `fastokd train`"
        )
    return path, *load_checkpoint(path)


def prune_checkpoints(folder: Path, kind: str, keep: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints of one kind."""
    for path in list_checkpoints(folder, kind)[keep:]:
        shutil.rmtree(path)
