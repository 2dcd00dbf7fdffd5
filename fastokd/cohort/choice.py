"""How a cohort runs: the alternatives that the autotuner measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Choice:
    """An engine, compiled or eager, and the memory format of maps and weights."""

    engine: str = "loop"
    compile: bool = False
    memory_format: str = "channels_last"

    @staticmethod
    def of(engine: str, compile: bool | None, memory_format: str) -> Choice:
        """What the options ask for; defaults are the loop, eager, in channels-last."""
        return Choice(
            "loop" if engine == "auto" else engine,
            bool(compile),
            "channels_last" if memory_format == "auto" else memory_format,
        )

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return FORMATS[self.memory_format]

    def __str__(self) -> str:
        how = "compiled" if self.compile else "eager"
        return f"{self.engine}, {how}, {self.memory_format}"
