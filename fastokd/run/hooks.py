"""Who watches a run. None of them can end it, hold it or hide what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastokd.errors import in_one_line, warn


class Watcher:
    """Is told every step and epoch; does nothing by itself."""

    title = ""

    def begin(self) -> None: ...

    def step(self, images: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def spared(act: Callable[[], object], what: str, *, of: type[BaseException] = Exception) -> bool:
    """Does what a run can do without; where it raises, a warning says so, and the answer is False."""
    try:
        act()
    except of as error:
        warn(f"{what}: {in_one_line(error)}")
        return False
    return True


class Watchers:
    """All who watch one run; one that fails is told no more, which a warning says.

    ``images`` counts what was trained on.
    """

    def __init__(self) -> None:
        self._watching: list[Watcher] = []
        self.images = 0

    def __enter__(self) -> Watchers:
        return self

    def __exit__(self, *_: object) -> None:
        for watcher in reversed(self._watching):
            self._tell(watcher, watcher.close)

    def begin(self, *watchers: Watcher) -> None:
        """Adds those without whom the run isn't begun; raises what they raise."""
        for watcher in watchers:
            watcher.begin()
            self._watching.append(watcher)

    def add(self, make: Callable[[], Watcher], title: str) -> None:
        """Adds one that the run can do without."""
        spared(lambda: self.begin(make()), f"the run goes on without {title}")

    def step(self, images: int) -> None:
        """One step was queued; nothing is read from the device."""
        self.images += images
        for watcher in self._watching:
            self._tell(watcher, watcher.step, images)

    def row(self, row: dict[str, Any]) -> None:
        """One epoch was measured, or trained."""
        for watcher in self._watching:
            self._tell(watcher, watcher.row, row)

    def _tell(self, watcher: Watcher, what: Callable[..., None], *told: Any) -> None:
        if not spared(lambda: what(*told), f"the run goes on without {watcher.title}"):
            self._watching = [other for other in self._watching if other is not watcher]
