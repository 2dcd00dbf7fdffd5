"""Joins the processes that torchrun started, and ends them together.

A rank that fails writes a key to the shared store. The other ranks may wait for it in a collective; a
thread of theirs reads the key twice a second and ends the process.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fastokd.distributed.ranks import PATIENCE
from fastokd.errors import UserError

FAILED = "failed"
LOOK_EVERY = 0.5
# Seconds that a rank has to end by itself after another has failed.
GRACE = 2.0


class EndedByAnother(SystemExit):
    """Another rank failed and prints why."""

    def __init__(self) -> None:
        super().__init__(1)


def launched() -> int:
    """Processes that torchrun started for this run; 1 without it.

    Raises:
        UserError: what the environment says can't be torchrun's.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or int(size) == 0:
        raise UserError(
            f"WORLD_SIZE is {size!r} in the environment: start several processes by torchrun, or "
            "`unset WORLD_SIZE` for one"
        )
    return int(size)


def _require_torchrun() -> None:
    """Raises a :class:`UserError` where the variables of a launch are inherited in part."""
    size = launched()
    rank, port = os.environ.get("RANK", ""), os.environ.get("MASTER_PORT", "")
    right = {
        "RANK": rank.isdecimal() and int(rank) < size,
        "MASTER_ADDR": bool(os.environ.get("MASTER_ADDR")),
        "MASTER_PORT": port.isdecimal(),
    }
    name = next((name for name, is_right in right.items() if not is_right), None)
    if name is not None:
        found = repr(os.environ[name]) if name in os.environ else "not set"
        raise UserError(
            f"WORLD_SIZE is {size} in the environment, but {name} is {found}: start by torchrun, or "
            "`unset WORLD_SIZE` for one process"
        )


def of_the_first_rank() -> bool:
    """Whether this process prints and writes; valid before the ranks are joined."""
    return os.environ.get("RANK", "0") == "0"


def device_here(name: str) -> str:
    """``--device`` for this process: each rank of a machine uses the GPU of its local rank.

    Raises:
        UserError: one GPU is named for all.
    """
    if launched() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name in ("auto", "cuda"):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    raise UserError(f"device is {name!r}, but every rank has a GPU of its own: use --device cuda")


@contextmanager
def joined(device: str, capture: bool = False) -> Iterator[None]:
    """Joins the ranks that torchrun started; does nothing for a single process.

    NCCL on GPUs, gloo on CPUs. A process group that exists already is used as it is.

    Raises:
        EndedByAnother: another rank failed first; its message is printed by it.
        UserError: the environment lacks a part of what torchrun sets.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    _require_torchrun()
    where = device_here(device)
    if capture:
        # NCCL's watchdog thread must not query events during graph capture.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    # After a restart by torchrun (--max-restarts) the store still holds the last attempt's keys.
    prefix = f"fastokd/attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    options: dict[str, Any] = {"backend": "gloo"}
    if where.startswith("cuda"):
        torch.cuda.set_device(where)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(where)}
    dist.init_process_group(
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        **options,
    )
    watch = Watch(dist.PrefixStore(prefix, store.clone()))
    watch.start()
    try:
        yield
    except Exception as error:
        if not watch.is_first(rank):
            raise EndedByAnother from error
        if isinstance(error, UserError):
            raise UserError(f"{error} (reported by rank {rank} of {size})") from error
        raise
    except SystemExit:  # they agreed to stop
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        watch.done.set()


class Watch(threading.Thread):
    """Ends this process where another rank has failed."""

    def __init__(self, store: Any) -> None:
        super().__init__(name="fastokd-watch", daemon=True)
        self.store = store
        self.done = threading.Event()
        self._asking = threading.Lock()

    def is_first(self, rank: int) -> bool:
        """Records that this rank failed; whether it is the first."""
        with self._asking:
            return int(self.store.compare_set(FAILED, "", str(rank))) == rank

    def run(self) -> None:
        while not self.done.wait(LOOK_EVERY):
            try:
                with self._asking:
                    failed = self.store.check([FAILED])
            except RuntimeError:  # the store's own process is gone: torchrun ends the others
                return
            if failed:
                break
        else:
            return
        if not self.done.wait(GRACE):
            sys.stderr.flush()
            os._exit(1)
