"""How a step runs: the alternatives that the autotuner measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Choice:
    """An engine, compiled or not, the memory format of maps and weights, and the form of the step.

    ``capture``: the step is a CUDA graph. ``streams``: within it the students of a ``loop`` run side
    by side, each on a stream of its own.
    """

    engine: str = "loop"
    compile: bool = False
    memory_format: str = "channels_last"
    capture: bool = False
    streams: bool = False

    @staticmethod
    def of(
        engine: str,
        compile: bool | None,
        memory_format: str,
        capture: bool = False,
        streams: bool | None = None,
    ) -> Choice:
        """What the options ask for; defaults are the loop, not compiled, in channels-last."""
        return Choice(
            "loop" if engine == "auto" else engine,
            bool(compile),
            "channels_last" if memory_format == "auto" else memory_format,
            capture,
            bool(streams),
        )

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return FORMATS[self.memory_format]

    def __str__(self) -> str:
        how = ["compiled"] * self.compile + ["captured"] * self.capture
        engine = f"{self.engine} in streams" if self.streams else self.engine
        return f"{engine}, {' + '.join(how) or 'eager'}, {self.memory_format}"
