"""What a person sees while it trains: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastokd.host.console import console
from fastokd.host.streams import Outlet, tell_lost
from fastokd.run.hooks import Watcher
from fastokd.run.metric_lines import choosing_split

if TYPE_CHECKING:
    from fastokd.run.session import Session


COLUMNS = (
    *("epoch", "images/s", "left", "lr", "loss"),
    *("student", "leader", "peers", "ensemble", "diversity"),
)
SHOWN = 10  # epochs at once: a table higher than the terminal can't be renewed in place


class Display(Watcher):
    """Shows what was measured in each epoch, and how far the run is."""

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
        shown = self.console.is_terminal and not quiet
        self.live = (
            Live(get_renderable=self.view, console=self.console, refresh_per_second=4)
            if shown
            else None
        )
        ranks = session.ranks.note(session.recipe.batch_size, session.recipe.students)
        self.note = "\n".join(filter(None, (session.data.note, ranks)))
        left = max(session.steps_left, 1)
        self.task = self.bar.add_task(
            "train", total=left, epoch=session.epoch + 1, epochs=self.epochs, rate=0.0
        )

    def begin(self) -> None:
        if self.note and not self.quiet:
            self._line(self.note)
        if self.live is not None:
            self.live.start(refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self._check_lost()

    def _line(self, text: str) -> None:
        # A log has no width: wrapped at 80 columns, an epoch would be two lines of it.
        self.console.print(text, soft_wrap=True)
        self._check_lost()

    def _check_lost(self) -> None:
        out = self.console.file
        if isinstance(out, Outlet):
            tell_lost(out)

    def view(self) -> Group:
        """The last epochs' table, the columns that nothing fills left out, and the bar."""
        kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in self.rows)]
        table = Table(box=None, padding=(0, 1))
        for index in kept:
            table.add_column(COLUMNS[index], justify="right")
        for row in self.rows:
            table.add_row(*(row[index].removeprefix("epoch ") for index in kept))
        return Group(*([table] if kept else []), self.bar)

    def step(self, images: int) -> None:
        self.images += images
        rate = self.images / (time.perf_counter() - self.started)
        self.bar.update(self.task, advance=1, rate=rate)

    def row(self, row: dict[str, Any]) -> None:
        epoch = row["epoch"] + 1
        self.bar.update(self.task, epoch=min(epoch + 1, self.epochs))
        if self.quiet:
            return
        elapsed = time.perf_counter() - self.started
        left = elapsed / (epoch - self.first_epoch) * (self.epochs - epoch)
        values = [*cells(row, self.epochs)]
        values.insert(2, f"{left:.0f} s")
        if self.live is not None:
            self.rows = [*self.rows, values][-SHOWN:]
            self._check_lost()
            return
        line = "  ".join(
            value if name == "epoch" else f"{name} {value}"
            for name, value in zip(COLUMNS, values, strict=True)
            if value
        )
        self._line(line)


def cells(row: dict[str, Any], epochs: int) -> list[str]:
    """One epoch's values for :data:`COLUMNS`, but the time left; "" for what there isn't.

    Accuracies and diversity are of the held-out images where the recipe has some, else of the test
    set; ``peers`` is the mean over the students that aren't the leader. A lone student is no peer.
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
