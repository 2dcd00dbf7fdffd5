"""Processes of one gloo group that run one check after another: starting them takes seconds."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = timedelta(seconds=120)


class Pool:
    """``world`` processes; :meth:`run` has each call a function of ``tests.distributed.checks``."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, Path(self.folder.name), rank, world), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``check`` returns on each rank; fails with the tracebacks of those that raised."""
        for pipe in self.pipes:
            pipe.send((check.__name__, args))
        stuck = [rank for rank, pipe in enumerate(self.pipes) if not pipe.poll(PATIENCE.seconds)]
        assert not stuck, f"ranks {stuck} don't answer"
        answers = [pipe.recv() for pipe in self.pipes]
        failed = [text for ok, text in answers if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(pipe: Any, folder: Path, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    from tests.distributed import checks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=PATIENCE
    )
    while True:
        name, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((True, getattr(checks, name)(*args)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
