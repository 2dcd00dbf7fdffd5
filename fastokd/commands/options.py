"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where the data sets lie.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto, bf16, fp16, tf32 or fp32.")]
Download = Annotated[bool, typer.Option(help="Fetch the data set where it is missing.")]
Engine = Annotated[str, typer.Option(help="How the students run: auto, loop, grouped or vmap.")]
Impl = Annotated[str, typer.Option(help="The ops: auto, torch, cpp or triton.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop a run after so many steps.")]
Loader = Annotated[str, typer.Option(help="Images on disk: auto, dali or torchvision.")]
Workers = Annotated[int, typer.Option(help="Its threads or processes; 0: one a core.")]
