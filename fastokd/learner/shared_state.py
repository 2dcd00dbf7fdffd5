"""The state of several ranks in one checkpoint.

Weights, running statistics and optimizer states have the same names for any number of ranks, so a run
can be resumed with another arrangement. A rank's own state (random numbers, metrics of its share of an
unfinished epoch) is under ``rank<r>.``; rank 0's has no prefix.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastokd.cohort.keys import split_key
from fastokd.distributed.ranks import Ranks
from fastokd.learner.learner import Learner

OWN = re.compile(r"(rng|meter)\.")
RANK = re.compile(r"rank\d+\.")


@torch.no_grad()
def share_state(learner: Learner) -> None:
    """Broadcasts each student from the rank that trains it; with data parallelism, rank 0's running
    statistics."""
    ranks = learner.ranks
    if ranks.size == 1:
        return
    S = len(learner.cohort.students)
    sources = [ranks.owner(student, S) for student in range(S)]

    def source(student: int | None) -> int:
        return 0 if student is None else sources[student]

    for name, value in learner.cohort.state_dict().items():
        _broadcast(value, source(split_key(name)[0]))
    for name, value in learner.method.state_dict().items():
        _broadcast(value, source(learner.method.belongs_to(name)))
    if learner.average is not None:
        for student, state in learner.average.states.items():
            for value in state.values():
                _broadcast(value, source(student))


def _broadcast(value: Tensor, source: int) -> None:
    dense = value.contiguous()  # collectives take contiguous tensors only
    dist.broadcast(dense, src=source)
    if dense.data_ptr() != value.data_ptr():
        value.copy_(dense)


def gathered(ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On rank 0, ``tensors`` and the other ranks' state; unchanged elsewhere.

    :func:`share_state` must have been called. The other ranks send the optimizer states of their
    students, and their own state.
    """
    if ranks.size == 1:
        return tensors
    sent = {}
    if ranks.rank > 0:
        for name, value in tensors.items():
            if OWN.match(name):
                sent[f"rank{ranks.rank}.{name}"] = value.cpu()
            elif name.startswith("optim.") and ranks.rank < ranks.students.size:
                sent[name] = value.cpu()
    pieces = ranks.collect(sent)
    if pieces is None:
        return tensors
    whole = dict(tensors)
    for piece in pieces[1:]:
        whole |= {name: value for name, value in piece.items() if name not in tensors}
    return whole


def mine(ranks: Ranks, tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that this rank loads.

    In the same arrangement each rank loads its own state. In another one rank 0 loads the sum of the
    unfinished epoch's metrics, and the other ranks' random numbers start anew, so the run doesn't give
    the same bits.
    """
    rows, columns = facts.get("ranks", (1, 1))
    common = {k: v for k, v in tensors.items() if not RANK.match(k)}
    if ranks.rank == 0 and (rows, columns) != ranks.arrangement:
        for row in range(1, rows):
            prefix = f"rank{row * columns}.meter."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    total = f"meter.{name.removeprefix(prefix)}"
                    common[total] = common[total] + value if total in common else value
    if ranks.rank == 0:
        return common
    prefix = f"rank{ranks.rank}."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shared = {k: v for k, v in common.items() if not OWN.match(k)}
    return shared | own if (rows, columns) == ranks.arrangement else shared
