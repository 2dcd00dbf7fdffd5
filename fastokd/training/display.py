"""What a person sees while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastokd.errors import warn
from fastokd.training.watchers import Watcher

if TYPE_CHECKING:
    from fastokd.training.session import Session


class Display:
    """Shows epoch, images/s and time left; one line an epoch with what was measured.

    ``others`` are told every epoch too.
    """

    def __init__(self, session: Session, quiet: bool, others: Sequence[Watcher] = ()) -> None:
        self.others = others
        self.epochs = session.recipe.epochs
        self.first_epoch = session.epoch
        self.quiet = quiet
        self.console = Console()
        self.images = 0
        self.started = time.perf_counter()
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            refresh_per_second=4,
        )
        ranks = session.ranks.note(session.recipe.batch_size, session.recipe.students)
        self.note = "\n".join(filter(None, (session.data.note, ranks)))
        left = max(session.steps_left, 1)
        self.task = self.bar.add_task(
            "train", total=left, epoch=session.epoch + 1, epochs=self.epochs, rate=0.0
        )

    def __enter__(self) -> Display:
        if self.note and not self.quiet:
            self.console.print(self.note, highlight=False, soft_wrap=True)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for watcher in self.others:
            self._tell(watcher, watcher.close)

    def _tell(self, watcher: Watcher, what: Callable[[], None]) -> None:
        """Those who can't be told are told no more; the run doesn't need them."""
        try:
            what()
        except OSError as error:
            warn(f"{type(watcher).__name__} is told no more: {error}")
            self.others = [other for other in self.others if other is not watcher]

    def step(self, images: int) -> None:
        """One step was queued; nothing is read from the device."""
        self.images += images
        rate = self.images / (time.perf_counter() - self.started)
        self.bar.update(self.task, advance=1, rate=rate)

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch was measured."""
        for watcher in list(self.others):
            self._tell(watcher, partial(watcher.row, row))
        epoch = row["epoch"] + 1
        self.bar.update(self.task, epoch=min(epoch + 1, self.epochs))
        if self.quiet:
            return
        elapsed = time.perf_counter() - self.started
        left = elapsed / (epoch - self.first_epoch) * (self.epochs - epoch)
        line = f"{epoch_line(row, self.epochs)}  left {left:.0f} s"
        # A log has no width: wrapped at 80 columns, an epoch would be two lines of it.
        self.console.print(line, highlight=False, soft_wrap=True)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in one line: rate, loss, and the held-out accuracies."""
    parts = [
        f"epoch {row['epoch'] + 1}/{epochs}",
        f"{row['images_per_second']:,.0f} images/s",
        f"lr {row['lr']:g}",
        f"loss {row['train']['loss']:.3f}",
    ]
    for split in ("val", "test"):
        if split in row:
            scores = row[split]
            if scores["leader_top1"] is not None:
                parts.append(f"{split} leader {scores['leader_top1']:.4f}")
            parts.append(f"{split} mean {scores['mean_top1']:.4f}")
            if scores["diversity"] is not None:
                parts.append(f"ensemble {scores['ensemble_top1']:.4f}")
    return "  ".join(parts)
