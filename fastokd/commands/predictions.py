"""Prints predictions, writes them as CSV, and reports the pictures that can't be read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError, UserError
from fastokd.host.console import console
from fastokd.host.names import as_csv, counted, first_names, on_a_line
from fastokd.student.pictures import find_pictures
from fastokd.student.predict import Prediction, Unread, predictions

# From this number of pictures on, a bar shows the progress.
MANY = 20


class Classified(NamedTuple):
    """The predictions in order, and the pictures that couldn't be read."""

    found: list[Prediction]
    unread: list[Unread]

    def to_json(self) -> list[dict[str, Any]]:
        """A row for each prediction."""
        return [
            {"image": str(p.image), "classes": p.classes, "probabilities": p.probabilities}
            for p in self.found
        ]

    def complain(self) -> None:
        """Prints a line to stderr for each picture that couldn't be read, and raises UserError if
        there is one."""
        if not self.unread:
            return
        if not self.found and len(self.unread) == 1:
            raise self.unread[0].error
        for picture in self.unread:
            print(on_a_line(picture.error), file=sys.stderr)
        count = counted(len(self.unread) + len(self.found), "picture")
        names = first_names([str(picture.image) for picture in self.unread], 3)
        raise UserError(
            f"{len(self.unread)} of {count} can't be read and {'is' if len(self.unread) == 1 else 'are'} "
            f"left out: replace or remove {names}"
        )


def classify(student: Path, images: list[str], *, printed: bool, **options: Any) -> Classified:
    """Classifies pictures with ``options`` of :func:`predictions`; ``printed``: each at once.

    A bar on stderr shows the progress, unless the predictions themselves do on the same terminal.
    """
    files = find_pictures(images)
    rows = predictions(student, files, **options)
    bar = Progress(
        TextColumn("pictures"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        disable=len(files) < MANY or (printed and sys.stdout.isatty()),
    )
    done = Classified([], [])
    with bar:
        for row in bar.track(rows, total=len(files)):
            if isinstance(row, Unread):
                done.unread.append(row)
                continue
            done.found.append(row)
            if printed:
                _show(row)
    return done


def _show(prediction: Prediction) -> None:
    print(on_a_line(prediction.image))
    for name, share in zip(prediction.classes, prediction.probabilities, strict=True):
        print(f"  {100 * share:5.1f} %  {on_a_line(name)}")


def check_csv(path: Path) -> None:
    """Raises UserError if a table can't be written there; a file that isn't a table is kept."""
    if path.suffix.lower() != ".csv":
        raise UserError(f"--csv is {path}: name a file that ends in .csv")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} can't be written: name a file in a folder that exists")


def write_csv(path: Path, found: list[Prediction]) -> None:
    """Writes a row a picture: ``image``, ``class``, ``probability``, then ``class_2``, ..."""
    ranks = max((len(prediction.classes) for prediction in found), default=1)
    header = ["image", "class", "probability"]
    header += [f"{name}_{rank}" for rank in range(2, ranks + 1) for name in header[1:3]]
    rows = [
        [p.image, *(cell for pair in zip(p.classes, p.probabilities, strict=True) for cell in pair)]
        for p in found
    ]
    try:
        write_durably(path, as_csv([header, *rows]).encode(errors="backslashreplace"))
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error}") from error
