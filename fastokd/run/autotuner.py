"""The choice of an engine: candidates, timings, the fastest.

Grouped convolutions and compiled code are faster on some machines and slower on others, so they are
measured (:mod:`fastokd.run.tuning`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.cohort.choice import FORMATS, Choice

# The largest share of a step that a choice is expected to save; it limits the cost of trials.
SAVABLE = 0.3
# A choice must be faster than the default by more than the noise of timings.
MARGIN = 0.03
# Tuning takes at most this share of a run, or so many seconds if that is more.
SHARE, SECONDS = 0.01, 20.0


@dataclass(frozen=True)
class Timing:
    """One candidate's timing, or a note why it has none.

    ``failed``: it can't run. ``final``: another run needn't try it again. ``compile_seconds``: the time
    before its first step.
    """

    choice: Choice
    step_ms: float | None = None
    compile_seconds: float = 0.0
    note: str = ""
    failed: bool = False
    final: bool = True

    @staticmethod
    def from_json(values: dict[str, Any]) -> Timing:
        """The reverse of ``dataclasses.asdict``.

        Raises:
            ValueError, TypeError, KeyError: the values are no timing's.
        """
        timing = Timing(**{**values, "choice": Choice(**values["choice"])})
        times = (timing.compile_seconds, *([] if timing.step_ms is None else [timing.step_ms]))
        if not all(0 <= float(time) < math.inf for time in times):
            raise ValueError(f"{values} is no timing")
        return timing


def candidates(
    engines: Iterable[str], memory_format: str, captures: Sequence[bool]
) -> list[Choice]:
    """Every engine in every allowed layout, not compiled, with each of ``captures``; the default first.
    Captured, the loop has streams, too.

    Where there are captured candidates, ``vmap`` is one of them only: uncaptured it has the most
    work for the host.
    """
    formats = list(FORMATS) if memory_format == "auto" else [memory_format]
    return [
        Choice(engine, False, layout, capture, streams)
        for capture in captures
        for layout in formats
        for engine in engines
        for streams in ((False, True) if capture and engine == "loop" else (False,))
        if capture or engine != "vmap" or not any(captures)
    ]


def allowance(step_ms: float, steps: float) -> float:
    """Seconds that tuning may take for ``steps`` more steps: a share of the run, and no more than a
    choice could save."""
    run = steps * step_ms / 1e3
    return min(max(SHARE * run, SECONDS), SAVABLE * run)


def pick(timings: Sequence[Timing], steps: int) -> Choice:
    """The fastest choice for a run of ``steps`` steps, compiling included.

    The first timing is the default's: it is kept unless it can't run or another is faster by more than
    :data:`MARGIN`. If nothing was timed, the first choice that hasn't failed is taken.
    """
    default = timings[0]
    known = [timing for timing in timings if timing.step_ms is not None]

    def cost(timing: Timing) -> float:
        assert timing.step_ms is not None
        return timing.step_ms * steps + 1e3 * timing.compile_seconds

    able = next((timing for timing in timings if not timing.failed), default)
    best = min(known, key=cost, default=able)
    if default.step_ms is None:
        # Final without a time: its trial took longer than it could save.
        return best.choice if default.failed or default.final else default.choice
    return best.choice if cost(best) < (1 - MARGIN) * cost(default) else default.choice


def table(timings: Sequence[Timing], chosen: Choice) -> str:
    """The measurements as lines of text, with a mark at the chosen one."""
    lines = [f"  {'engine, how, layout':44}ms a step"]
    for timing in timings:
        mark = "*" if timing.choice == chosen else " "
        took = "" if timing.step_ms is None else f"{timing.step_ms:9.1f}"
        compiled = f"  (compiled in {timing.compile_seconds:.0f} s)" * bool(timing.compile_seconds)
        note = f"  {timing.note}" if timing.note else ""
        lines.append(f"{mark} {timing.choice!s:44}{took}{compiled}{note}")
    return "\n".join(lines)
