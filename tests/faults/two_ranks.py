"""What each of two ranks runs under torchrun: trains, and is killed where the attempt says so.

    torchrun --standalone --nproc-per-node 2 --max-restarts 2 -m tests.faults.two_ranks FOLDER KILLS

In the first attempt the second rank gets SIGKILL within a step, in the next one the first rank
within a checkpoint's write; those after that come to the end.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions
from fastokd.train import train

RECIPE = dataclasses.replace(recipe("dml-network@2/resnet8/digits", epochs=2), batch_size=100)
OPTIONS = RunOptions(
    quiet=True,
    engine="loop",
    precision="fp32",
    device="cpu",
    impl="torch",
    save_every_steps=1,
    eval_every=2,
)


def killed_at(number: int, act: Callable[..., Any]) -> Callable[..., Any]:
    """``act``, whose call ``number`` is the last thing that this process does."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **kwargs)

    return called


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if attempt < kills and (attempt, rank) == (0, 1):
        loop = sys.modules["fastokd.train"]
        loop.training_step = killed_at(4, loop.training_step)  # type: ignore[attr-defined]
    if attempt < kills and (attempt, rank) == (1, 0):
        # Five calls a checkpoint, after the resumed run's lines; within its second one.
        os.fsync = killed_at(11, os.fsync)
    train(RECIPE, OPTIONS, out=folder, resume=(folder / "checkpoints").is_dir())


if __name__ == "__main__":
    main()
