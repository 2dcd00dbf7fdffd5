"""A run's metrics: exact counts over batches, kept on the device and read once; and ``metrics.jsonl``,
one line an epoch, whose lines wait in memory while the disk can't be written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.checkpoint import write_durably
from fastokd.distributed.ranks import Ranks
from fastokd.errors import UserError

Row = dict[str, Any]
# The metrics of every measured split.
MEASURED = {
    *("leader_top1", "mean_top1", "student_top1", "ensemble_top1", "ensemble_logits_top1"),
    "diversity",
}


def label_rank(logits_SBC: Tensor, labels_B: Tensor) -> Tensor:
    """The number of classes that rank before the label, ``[S, B]``: ties by index, NaN first. C for a
    label that is no class."""
    S, B, C = logits_SBC.shape
    class_B = labels_B.clamp(0, C - 1)
    picked_SB1 = logits_SBC.gather(2, class_B.expand(S, B)[..., None])
    # "Not at most" in place of "above": NaN must never count as correct.
    before_SBC = ~(logits_SBC <= picked_SB1)
    earlier_BC = torch.arange(C, device=labels_B.device) < class_B[:, None]
    ties_SBC = (logits_SBC == picked_SB1) & earlier_BC
    return (before_SBC | ties_SBC).sum(2).masked_fill(class_B != labels_B, C)


def peer_diversity(probs_PBC: Tensor) -> Tensor:
    """Sum over samples of the mean Euclidean distance between pairs of peers (Figure 2)."""
    P = probs_PBC.shape[0]
    first, second = torch.triu_indices(P, P, 1, device=probs_PBC.device)
    distances_QB = torch.linalg.vector_norm(probs_PBC[first] - probs_PBC[second], dim=2)
    return distances_QB.mean(0).sum()


class Meter:
    """Accumulates the metrics of DESIGN's ``metrics.jsonl`` over batches of any size.

    ``has_leader``: the last student is the leader; ensemble and diversity count its peers only.
    ``totals``, tensors on the device, is the whole state: a run can be resumed between two batches.
    Once made they are changed in place, so a captured step can add to them.
    """

    def __init__(self, students: int, has_leader: bool) -> None:
        self.students = students
        self.has_leader = has_leader
        self.peers = students - 1 if has_leader else students
        self.totals: dict[str, Tensor] = {}
        self._flat_T: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        logits_SBC: Tensor,
        labels_B: Tensor,
        averages: dict[str, Tensor] | None = None,
        untaken: Tensor | None = None,
    ) -> None:
        """Counts one batch; ``averages`` are batch means (a loss, an attention matrix).

        A batch whose 0-d ``untaken`` isn't 0 isn't counted.
        """
        logits_SBC = logits_SBC.detach().float()
        peers_PBC = logits_SBC[: self.peers]
        probs_PBC = F.softmax(peers_PBC, dim=2)
        ensembles_2BC = torch.stack([probs_PBC.mean(0), peers_PBC.mean(0)])
        rank_SB = label_rank(torch.cat([logits_SBC, ensembles_2BC]), labels_B)
        B, device = labels_B.shape[0], labels_B.device
        tops_211 = torch.arange(1, 6, 4, device=device)[:, None, None]
        top1_S, top5_S = (rank_SB < tops_211).sum(2)
        sums = {"top1": top1_S, "top5": top5_S}
        # Of float64, and so is the concatenation.
        sums["count"] = torch.full((), B, dtype=torch.float64, device=device)
        if self.peers > 1:
            sums["diversity"] = peer_diversity(probs_PBC)
        if averages:
            sums |= _times(averages, B)
        total_T = torch.cat([value.reshape(-1) for value in sums.values()])
        if untaken is not None:
            total_T = total_T.masked_fill(untaken != 0, 0.0)
        if self._flat_T is None:
            self._lay_out(sums)
        assert self._flat_T is not None
        self._flat_T.add_(total_T)

    def _lay_out(self, sums: dict[str, Tensor]) -> None:
        """Makes the totals views of one tensor, which one operation adds to."""
        begun, sizes = self.totals, [value.numel() for value in sums.values()]
        device = next(iter(sums.values())).device
        self._flat_T = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.totals = {
            name: flat.view(value.shape)
            for (name, value), flat in zip(sums.items(), self._flat_T.split(sizes), strict=True)
        }
        self.set(begun)

    def set(self, totals: dict[str, Tensor]) -> None:
        """Continues from ``totals``; from nothing where it is empty."""
        for name in self.totals.keys() - totals.keys():
            self.totals[name].zero_()
        for name, value in totals.items():
            if name in self.totals:
                self.totals[name].copy_(value)
            else:
                self.totals[name] = value.clone()

    def result(self, ranks: Ranks | None = None) -> dict[str, Any]:
        """The metrics over all ``ranks``, as plain numbers and lists; accuracies are from 0 to 1."""
        totals = {name: value.cpu() for name, value in self.totals.items()}
        totals = (ranks or Ranks()).summed(totals)
        if not totals.get("count"):
            return {}
        count = totals["count"]
        result: dict[str, Any] = {}
        for top in ("top1", "top5"):
            values = (totals[top] / count).tolist()
            students, (by_probs, by_logits) = values[: self.students], values[self.students :]
            result[f"leader_{top}"] = students[-1] if self.has_leader else None
            result[f"mean_{top}"] = sum(students) / len(students)
            result[f"student_{top}"] = students
            result[f"ensemble_{top}"] = by_probs
            result[f"ensemble_logits_{top}"] = by_logits
        diversity = totals.get("diversity")
        result["diversity"] = None if diversity is None else (diversity / count).item()
        for name, value in totals.items():
            if name.startswith("mean."):
                result[name.removeprefix("mean.")] = (value / count).tolist()
        return result


def _times(averages: dict[str, Tensor], B: int) -> dict[str, Tensor]:
    """Batch means to sums over the batch, in one multiplication."""
    flat_T = torch.cat([value.detach().reshape(-1) for value in averages.values()]) * B
    sizes = [value.numel() for value in averages.values()]
    return {
        f"mean.{name}": part.view(value.shape)
        for (name, value), part in zip(averages.items(), flat_T.split(sizes), strict=True)
    }


class MetricLines:
    """The lines of one run; lines that couldn't be written wait, and are written first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Row] = []
        self._torn = False

    def read(self) -> list[Row]:
        """The epochs so far, without an incomplete last line.

        Raises:
            UserError: a line isn't an epoch's.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: {error}; remove the line that is") from error
        if not all(map(_is_epoch, rows)):
            raise UserError(f"{self.path} is damaged: a line isn't an epoch's; remove it")
        return rows

    def replace(self, rows: Sequence[Row]) -> None:
        """Replaces all lines; raises OSError and then leaves the file as it was."""
        write_durably(self.path, b"".join(map(_line, rows)))

    def add(self, row: Row) -> None:
        """Adds an epoch, without writing it."""
        self._waiting.append(row)

    def write(self) -> None:
        """Writes the waiting lines.

        Raises:
            OSError: they still wait; the complete lines of the file are as they were.
        """
        if not self._waiting:
            return
        if self._torn:
            # The file may end in a part of a line, or in a line that wasn't flushed.
            first = self._waiting[0]["epoch"]
            before = [row for row in self.read() if row["epoch"] < first]
            self.replace([*before, *self._waiting])
        else:
            self._torn = True
            with open(self.path, "ab") as file:
                file.write(b"".join(map(_line, self._waiting)))
                file.flush()
                os.fsync(file.fileno())
        self._torn = False
        self._waiting.clear()


def choosing_split(rows: Sequence[Row]) -> str:
    """The split that the best epoch of ``rows`` is chosen on: ``"val"`` if every row has it, else
    ``"test"``."""
    return "val" if all(row.get("val") for row in rows) else "test"


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _is_epoch(row: Any) -> bool:
    """Whether a line has the fields that all readers need."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    if type(row.get("step", 0)) is not int or not isinstance(row.get("seconds", 0), (int, float)):
        return False
    splits = [row[name] for name in ("val", "test") if row.get(name) is not None]
    return all(isinstance(split, dict) and split.keys() >= MEASURED for split in splits)
