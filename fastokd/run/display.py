"""The progress display: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torchvision.utils import make_grid, save_image

from fastokd.checkpoint import writing
from fastokd.data.balance import sentences
from fastokd.data.held_out import listed
from fastokd.host.console import console
from fastokd.host.streams import Outlet, tell_lost
from fastokd.metrics import choosing_split
from fastokd.run.hooks import Hook
from fastokd.run.session import Session

COLUMNS = (
    *("epoch", "images/s", "left", "lr", "train loss"),
    *("student", "leader", "peers", "ensemble", "diversity"),
)
# The columns that are top-1 on the split that the display shows (:func:`choosing_split`).
TOP1 = COLUMNS[5:9]
SHOWN = 10  # epochs; a table higher than the terminal can't be updated in place


class Display(Hook):
    """Shows each epoch's metrics and the progress."""

    title = "its display"

    def __init__(self, session: Session, quiet: bool) -> None:
        self.epochs = session.recipe.epochs
        self.first_epoch = session.epoch
        self.quiet = quiet
        self.console = console()
        self.images = 0
        self.started = time.perf_counter()
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.rows: list[list[str]] = []
        self.split = "test"
        shown = self.console.is_terminal and not quiet
        self.live = (
            Live(get_renderable=self.view, console=self.console, refresh_per_second=4)
            if shown
            else None
        )
        ranks = session.learner.ranks.note(session.recipe.batch_size, session.recipe.students)
        counts = sentences(listed(session.data))
        self.note = "\n".join(filter(None, (session.data.note, *counts, ranks)))
        left = max(session.steps_left, 1)
        self.task = self.bar.add_task(
            "train", total=left, epoch=session.epoch + 1, epochs=self.epochs, rate=0.0
        )

    def on_begin(self) -> None:
        if self.note and not self.quiet:
            self._line(self.note)
        if self.live is not None:
            self.live.start(refresh=True)

    def on_end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self._check_lost()

    def _line(self, text: str) -> None:
        # No wrapping: in a log an epoch has one line.
        self.console.print(text, soft_wrap=True)
        self._check_lost()

    def _check_lost(self) -> None:
        out = self.console.file
        if isinstance(out, Outlet):
            tell_lost(out)

    def view(self) -> Group:
        """The table of the last epochs without empty columns, and the bar."""
        kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in self.rows)]
        table = Table(box=None, padding=(0, 1))
        for index in kept:
            table.add_column(heads(self.split)[index], justify="right", vertical="bottom")
        for row in self.rows:
            table.add_row(*(row[index].removeprefix("epoch ") for index in kept))
        return Group(*([table] if kept else []), self.bar)

    def on_step(self, images: int) -> None:
        self.images += images
        rate = self.images / (time.perf_counter() - self.started)
        self.bar.update(self.task, advance=1, rate=rate)

    def on_epoch(self, row: dict[str, Any]) -> None:
        epoch = row["epoch"] + 1
        self.bar.update(self.task, epoch=min(epoch + 1, self.epochs))
        if self.quiet:
            return
        elapsed = time.perf_counter() - self.started
        left = elapsed / (epoch - self.first_epoch) * (self.epochs - epoch)
        values = [*cells(row, self.epochs)]
        values.insert(2, f"{left:.0f} s")
        if "test" in row:
            self.split = choosing_split([row])
        if self.live is not None:
            self.rows = [*self.rows, values][-SHOWN:]
            self._check_lost()
            return
        told = [(name, value) for name, value in zip(COLUMNS, values, strict=True) if value]
        first = next((name for name, _ in told if name in TOP1), None)
        words = {first: f"{self.split} top-1: {first}", "diversity": f"{self.split} diversity"}
        parts = [f"{words.get(name, name)} {value}" for name, value in told if name != "epoch"]
        self._line("  ".join([values[0], *parts]))


def heads(split: str) -> list[str]:
    """The heads of the table's columns; figures of the students name their split."""
    of_split = {name: f"{split}\ntop-1\n{name}" for name in TOP1}
    named = {"train loss": "train\nloss", "diversity": f"{split}\ndiversity", **of_split}
    return [named.get(name, name) for name in COLUMNS]


def cells(row: dict[str, Any], epochs: int) -> list[str]:
    """One epoch's values for :data:`COLUMNS` without the time left; "" if there is none.

    Accuracies and diversity are on held-out images if the recipe has some, else on the test set.
    ``peers`` is the mean over the students but the leader; a single student is no peer.
    """
    values = [
        f"epoch {row['epoch'] + 1}/{epochs}",
        f"{row['images_per_second']:,.0f}",
        f"{row['lr']:g}",
        f"{row['train']['loss']:.3f}",
    ]
    scores = row.get(choosing_split([row]))
    if scores is None:
        return [*values, "", "", "", "", ""]
    leader, students = scores["leader_top1"], scores["student_top1"]
    if len(students) == 1:
        return [*values, f"{students[0]:.4f}", "", "", "", ""]
    peers = students if leader is None else students[:-1]
    return [
        *values,
        "",
        "" if leader is None else f"{leader:.4f}",
        f"{sum(peers) / len(peers):.4f}",
        f"{scores['ensemble_top1']:.4f}",
        "" if scores["diversity"] is None else f"{scores['diversity']:.4f}",
    ]


def show_batch(session: Session, folder: Path) -> Path:
    """Writes the next augmented batch as ``augmentation.png``; where each student has a view of its own,
    an image's views stand side by side."""
    images, _ = session.mixed(*session.next_batch())
    images_NHWC = images.transpose(0, 1).flatten(0, 1) if images.dim() == 5 else images
    images_BCHW = images_NHWC[:64].permute(0, 3, 1, 2).cpu().float() / 255
    path = folder / "augmentation.png"

    def write() -> Path:
        with writing(folder):
            save_image(make_grid(images_BCHW, nrow=8), path)
        return path

    return session.learner.ranks.first(write)
