"""Finds and reads the files of a data set."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastokd.errors import UserError

MAX_MEMBER = 1 << 30
MAX_ARCHIVE = 1 << 32


class FileBytes(NamedTuple):
    """A file's content, and its name for errors."""

    where: str
    data: bytes


def need_root(name: str, root: Path | None) -> Path:
    """Checks that ``root`` is given and isn't a file."""
    if root is None:
        raise UserError(f"{name} needs to know where its files are: give --data-root DIR")
    root = Path(root).expanduser()
    if root.exists() and not root.is_dir():
        raise UserError(f"the data root {root} is a file: give the folder that holds {name}")
    return root


def read_file(path: Path) -> FileBytes:
    """The whole of ``path``."""
    try:
        if path.stat().st_size > MAX_MEMBER:
            raise UserError(f"{path} is larger than any file of the data set: fetch it again")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: fetch the data set again (--download)") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    if not data:
        raise UserError(f"{path} is empty: fetch it again (--download)")
    return FileBytes(str(path), data)


def read_members(
    archive: Path, names: list[str], largest: int = MAX_MEMBER
) -> dict[str, FileBytes]:
    """The regular files called ``names`` in a ``.tar.gz`` of members of at most ``largest`` bytes, read
    into memory.

    Raises:
        UserError: the archive is damaged, too large, lacks one of the names, or has a member with a
            path outside of it.
    """
    found: dict[str, FileBytes] = {}
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in _checked(tar, archive, largest):
                    path = str(PurePosixPath(member.name))
                    if path in names and member.isreg():
                        file = tar.extractfile(member)
                        assert file is not None
                        found[path] = FileBytes(f"{archive}:{path}", file.read())
            # Read to the end, where gzip's checksum is.
            while stream.tell() < MAX_ARCHIVE and stream.read(1 << 20):
                pass
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{archive} is damaged ({error}): remove it and fetch it again (--download)"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{archive} has no {missing[0]}: remove it and fetch it again (--download)")
    return found


def _checked(tar: tarfile.TarFile, archive: Path, largest: int) -> Iterator[tarfile.TarInfo]:
    """The members, each checked to be a file or a folder of reasonable size."""
    total = 0
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
            raise UserError(
                f"{archive} holds {member.name!r}, which a data set's archive never does: "
                "remove it and fetch it again (--download)"
            )
        total += member.size
        if member.size > largest or total > MAX_ARCHIVE:
            raise UserError(
                f"{archive} unpacks to more than a data set has: remove it and fetch it again "
                "(--download)"
            )
        yield member


def download(name: str, url: str, folder: Path, md5: str) -> None:
    """Fetches one file into ``folder`` with torchvision's downloader, unless it is there intact."""
    from torchvision.datasets.utils import download_url

    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url(url, str(folder), md5=md5)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"can't download {name} from {url} to {folder} ({error}): "
            "fetch it by hand and give --data-root"
        ) from error
