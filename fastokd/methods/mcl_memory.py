"""The memory of MCL's ImageNet form: the embeddings of every training image by every student."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from fastokd.errors import UserError
from fastokd.methods.base import INDEX


class Memory(nn.Module):
    """M, ``[S, N, D]``, and which rows of it a sample is contrasted with.

    An image's rows are its own, one other of its class, and ``negatives`` of other classes, drawn with
    replacement. After a step that is taken its own row becomes normalised(momentum M + (1 - momentum) e).

    Args:
        students: S.
        width: D.
        negatives: rows of other classes.
        momentum: the share of the old row.
    """

    memory_SND: Tensor
    sorted_N: Tensor
    place_N: Tensor
    first_C: Tensor
    count_C: Tensor

    def __init__(self, students: int, width: int, negatives: int, momentum: float) -> None:
        super().__init__()
        if momentum >= 1:
            raise UserError(f"memory_momentum is {momentum}: it must be below 1")
        self.students, self.width = students, width
        self.negatives, self.momentum = negatives, momentum
        self.started = False

    def start(self, labels_N: Tensor, generator: Generator) -> None:
        """Fills the memory: uniform within sqrt(3 / D) of 0, as published.

        Raises:
            UserError: all images are of one class.
        """
        labels_N = labels_N.cpu()
        count_C = torch.bincount(labels_N)
        if count_C.max() == len(labels_N):
            raise UserError(
                "the memory form contrasts images with those of other classes, but all training images "
                "are of one: add images of another class"
            )
        N, width = len(labels_N), math.sqrt(3.0 / self.width)
        memory_SND = torch.rand(self.students, N, self.width, generator=generator)
        self.register_buffer("memory_SND", memory_SND.mul_(2 * width).sub_(width))
        sorted_N = labels_N.argsort(stable=True)
        first_C = count_C.cumsum(0) - count_C
        place_N = torch.empty_like(sorted_N)
        place_N[sorted_N] = torch.arange(N)
        tables = {"sorted_N": sorted_N, "place_N": place_N, "first_C": first_C, "count_C": count_C}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.started = True

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """Uniform numbers in [0, 1), which :meth:`rows` turns into rows."""
        return {
            "positive_B": torch.rand(batch, generator=generator),
            "negative_BK": torch.rand(batch, self.negatives, generator=generator),
        }

    def rows(self, draws: dict[str, Tensor], labels_B: Tensor) -> Tensor:
        """The rows of each image of the batch, int64 ``[B, 2 + negatives]``."""
        if INDEX not in draws:
            raise UserError(
                "progress has no draws for the memory: set progress.draws to method.draw(B, generator) and "
                f"its {INDEX!r} to the images' numbers in the training set"
            )
        index_B = draws[INDEX]
        first_B, count_B = self.first_C[labels_B], self.count_C[labels_B]
        # Its place among those of its class, then a step of 1 to count - 1 around them.
        place_B = self.place_N[index_B] - first_B
        step_B = 1 + (draws["positive_B"] * (count_B - 1)).long().minimum(count_B - 2).clamp_min(0)
        same_B = first_B + (place_B + step_B) % count_B
        # Its own class is left out of the order by class.
        N = len(self.sorted_N)
        others_B1 = (N - count_B)[:, None]
        place_BK = (draws["negative_BK"] * others_B1).long().minimum(others_B1 - 1)
        place_BK = place_BK + count_B[:, None] * (place_BK >= first_B[:, None])
        places_BK = torch.cat([same_B[:, None], place_BK], dim=1)
        return torch.cat([index_B[:, None], self.sorted_N[places_BK]], dim=1)

    @torch.no_grad()
    def renew(self, index_B: Tensor, embeddings_SBD: Tensor, untaken: Tensor) -> None:
        """Moves the rows of the batch's images to their embeddings where the 0-d ``untaken`` is 0."""
        old_SBD = self.memory_SND.index_select(1, index_B)
        new_SBD = self.momentum * old_SBD
        new_SBD += (1.0 - self.momentum) * embeddings_SBD.to(new_SBD.dtype)
        new_SBD /= new_SBD.norm(dim=-1, keepdim=True)
        self.memory_SND.index_copy_(1, index_B, torch.where(untaken != 0, old_SBD, new_SBD))
