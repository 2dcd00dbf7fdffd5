"""Loggers: TensorBoard and Weights & Biases. Both log the rows of ``metrics.jsonl``."""

from __future__ import annotations

import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from fastokd.errors import UserError, in_one_line
from fastokd.host.names import in_utf8, on_a_line
from fastokd.recipe.recipe import Recipe
from fastokd.run.hooks import Hook

# Timeouts in seconds to begin, which may need a server, and to end.
BEGIN, END = 60.0, 30.0
THREAD = "fastokd-logger"


class Sink(Protocol):
    """Writes rows; it is made, used and closed in one thread."""

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raises UserError with the package's name if a requested logger isn't installed."""
    for wanted, name in ((tensorboard, "tensorboard"), (wandb, "wandb")):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs {name}, which isn't installed: pip install {name}")


def loggers(
    recipe: Recipe, folder: Path, first_step: int, *, tensorboard: bool, wandb: bool
) -> list[Logger]:
    """The requested loggers; ``first_step`` is a resumed run's next step."""
    found = []
    if tensorboard:
        found.append(Logger(TensorBoard, folder, first_step))
    if wandb:
        found.append(Logger(WeightsAndBiases, recipe, folder))
    return found


class Logger(Hook):
    """A sink in its own thread, so that its errors, prompts and waits don't reach the run."""

    def __init__(self, sink: Any, *arguments: Any) -> None:
        self.title, self._sink, self._arguments = sink.title, sink, arguments
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._begun = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def _run(self) -> None:
        try:
            sink: Sink = self._sink(*self._arguments)
            self._begun.set()
            while (row := self._rows.get()) is not None:
                sink.row(row)
            sink.close()
        except BaseException as error:
            self._error = error
            self._begun.set()

    def on_begin(self) -> None:
        """Starts the thread, with standard input closed so that nothing can prompt.

        Raises:
            UserError: the logger can't be used; the message says why and what to do.
        """
        asked, sys.stdin = sys.stdin, open(os.devnull)  # noqa: SIM115
        try:
            self._thread.start()
            begun = self._begun.wait(BEGIN)
        finally:
            sys.stdin.close()
            sys.stdin = asked
        if self._error is not None or not begun:
            self._rows.put(None)  # ends a logger that begins after the timeout
            why = f"no answer within {BEGIN:g} s" if not self._error else in_one_line(self._error)
            raise UserError(f"{self.title} can't be used: {why}; {self._sink.fix}")

    def on_epoch(self, row: dict[str, Any]) -> None:
        self._raise_error()
        self._rows.put(row)

    def on_end(self) -> None:
        self._rows.put(None)
        self._thread.join(END)
        self._raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"it didn't end within {END:g} s; {self._sink.later}")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"{in_one_line(self._error)}; {self._sink.later}")


def still_busy() -> bool:
    """Whether a logger's thread still runs."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class TensorBoard:
    """Scalars under ``RUN/tensorboard``; a resumed run replaces repeated steps."""

    title = "TensorBoard"
    fix = "install tensorboard anew, or leave --tensorboard out"
    later = "metrics.jsonl has every row"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = ExitStack()
        place = self.folder.enter_context(in_utf8(folder)) / "tensorboard"
        self.writer = SummaryWriter(str(place), purge_step=first_step)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in scalars(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        self.folder.close()


class WeightsAndBiases:
    """A run named after the folder, with the recipe as its configuration."""

    title = "Weights & Biases"
    fix = "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline, or leave --wandb out"
    later = "metrics.jsonl has every row, and `wandb sync` sends what RUN/wandb holds"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        name = on_a_line(folder.name)
        self.folder = ExitStack()
        place = str(self.folder.enter_context(in_utf8(folder)))
        self.run = wandb.init(project="fastokd", name=name, dir=place, config=recipe.to_json())

    def row(self, row: dict[str, Any]) -> None:
        self.run.log(dict(scalars(row)), step=row["step"])

    def close(self) -> None:
        self.run.finish()
        self.folder.close()


def scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name, ``test/leader_top1`` or ``train/ce_S/2``, without matrices."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and not any(isinstance(entry, list) for entry in value):
            yield from scalars(
                {str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}/"
            )
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
