"""Hooks, called at the events of a run: display, loggers, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastokd.errors import in_one_line, warn


class Hook:
    """Called at the events of a run; the base class does nothing.

    Attributes:
        optional: if the hook raises, it is removed with a warning.
        title: its name in that warning.
    """

    optional = True
    title = ""

    def on_begin(self) -> None:
        """The run begins."""

    def on_step(self, images: int) -> None:
        """A step over ``images`` images was queued; nothing is read from the device."""

    def on_batch(self) -> None:
        """A batch of an evaluation was queued."""

    def on_last_batch(self) -> None:
        """All batches of the epoch are queued; the hook may move the session's position back."""

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch was trained, or measured, and is being saved: its row of ``metrics.jsonl``."""

    def on_end(self) -> None:
        """The run has ended."""


def spared(act: Callable[[], object], what: str, *, of: type[BaseException] = Exception) -> bool:
    """Calls ``act``; if it raises an ``of``, warns and returns False."""
    try:
        act()
    except of as error:
        warn(f"{what}: {in_one_line(error)}")
        return False
    return True


class Hooks:
    """All hooks of one run, called in the order of addition. ``images`` counts the training images."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []
        self.images = 0

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in reversed(self._hooks):
            self._call(hook, hook.on_end)

    def add(self, *hooks: Hook) -> None:
        """Adds hooks; raises what their ``on_begin`` raises."""
        for hook in hooks:
            hook.on_begin()
            self._hooks.append(hook)

    def try_add(self, make: Callable[[], Hook], title: str) -> None:
        """Adds a hook; warns if it can't be made or begun."""
        spared(lambda: self.add(make()), f"the run continues without {title}")

    def on_step(self, images: int) -> None:
        self.images += images
        self._call_all("on_step", images)

    def on_batch(self) -> None:
        self._call_all("on_batch")

    def on_last_batch(self) -> None:
        self._call_all("on_last_batch")

    def on_epoch(self, row: dict[str, Any]) -> None:
        self._call_all("on_epoch", row)

    def _call_all(self, event: str, *values: Any) -> None:
        for hook in self._hooks:
            self._call(hook, getattr(hook, event), *values)

    def _call(self, hook: Hook, event: Callable[..., None], *values: Any) -> None:
        if not hook.optional:
            event(*values)
        elif not spared(lambda: event(*values), f"the run continues without {hook.title}"):
            self._hooks = [other for other in self._hooks if other is not hook]
