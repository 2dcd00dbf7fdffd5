"""Students on several ranks (``--parallel students``).

Each rank of a row trains its share of the students on the same images. One all-gather gives every rank
what the loss reads: logits, pooled features, and for FFSD the last maps.

The other ranks' outputs carry no gradient, and every rank computes the whole loss. So each rank has the
gradient of the whole sum with respect to its own students' outputs, targets included, and the gather
needs no backward communication. Splitting the loss across ranks would need an all-reduce of its
gradients. FFSD detaches all targets, so each rank computes the loss of its own students only, with
their decoders; the leader's rank also has the fusion module and the transfusion.

The parameters that a method shares between students (OKDDip's projections) are trained on every rank of
the row, with averaged gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastokd.cohort import Cohort
from fastokd.distributed.ranks import Line, Ranks
from fastokd.errors import UserError
from fastokd.methods import Method, MethodLoss
from fastokd.models import StudentOutput


class StudentParallel:
    """Makes a cohort and its method train this rank's students only.

    Raises:
        UserError: the students share a trunk, or the precision has a loss scale.
    """

    def __init__(
        self, cohort: Cohort, method: Method, ranks: Ranks, precision: str, name: str
    ) -> None:
        """``name``: the method's, for the message."""
        if cohort.sharing == "branch":
            raise UserError(
                f"parallel is 'students', but the branches of {name} share a trunk, whose "
                "gradient needs all of them on one GPU: use --parallel data, or a network form"
            )
        if method.needs.companion != "none":
            raise UserError(
                f"parallel is 'students', but {name} averages the weights of all students in each step, and a "
                "rank has its own only: use --parallel data"
            )
        if precision == "fp16":
            raise UserError(
                "parallel is 'students', but fp16's loss scale follows the overflows of all "
                "students: use --precision bf16, or --parallel data"
            )
        self.line = ranks.students
        own = ranks.share(len(cohort.students))
        cohort.train_only(own, Exchange(self.line, cohort, method))
        self.shared: list[nn.Parameter] = []
        for name, parameter in method.named_parameters():
            owner = method.belongs_to(name)
            parameter.requires_grad_(owner is None or owner in own)
            if owner is None:
                self.shared.append(parameter)
        self.sums_up = method.needs.own_rows

    def whole(self, loss: MethodLoss) -> MethodLoss:
        """The loss with the value over all ranks and the gradient of this rank's students."""
        if not self.sums_up:
            return loss
        values = [loss.total.detach(), *loss.parts.values()]
        flat = torch.cat([value.reshape(-1).to(loss.total.dtype) for value in values])
        dist.all_reduce(flat, group=self.line.group)
        total, *parts = flat.split([value.numel() for value in values])
        return MethodLoss(
            loss.total + (total[0] - loss.total.detach()),
            {k: new.view_as(v) for (k, v), new in zip(loss.parts.items(), parts, strict=True)},
            loss.kept,
        )

    @torch.no_grad()
    def level(self) -> None:
        """Averages the gradients of shared parameters over the ranks, to the same bits."""
        gradients = [p.grad for p in self.shared if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / self.line.size
        dist.all_reduce(flat, group=self.line.group)
        for gradient, new in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(new.view_as(gradient))

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """``clip_grad_norm_`` by the norm over all ranks' students; shared parameters count once."""
        shared = {id(p) for p in self.shared}
        ours = [p for p in parameters if p.grad is not None]
        own = [p.grad for p in ours if id(p) not in shared]
        squares = get_total_norm([g for g in own if g is not None]).square()
        dist.all_reduce(squares, group=self.line.group)
        common = [p.grad for p in ours if id(p) in shared]
        squares += get_total_norm([g for g in common if g is not None]).square()
        norm = squares.sqrt()
        clip_grads_with_norm_(ours, most, norm)
        return norm


class Exchange:
    """Turns this rank's outputs into those of all students; the others' carry no gradient."""

    def __init__(self, line: Line, cohort: Cohort, method: Method) -> None:
        self.line = line
        self.shape = replace(cohort.shape, cohort=None)
        self.maps = method.needs.maps
        count = self.shape.students
        self.shares = [Ranks(students=Line(r, line.size)).share(count) for r in range(line.size)]

    def __call__(self, own: list[StudentOutput]) -> list[StudentOutput]:
        """One all-gather; shares of unequal size are padded to the largest."""
        sent = [value for output in own for value in self._shown(output)]
        flat = torch.cat([value.detach().reshape(-1) for value in sent])
        lengths = [
            [value for s in share for value in self._lengths(s, own[0])] for share in self.shares
        ]
        most = max(map(sum, lengths))
        mine = flat if len(flat) == most else torch.cat([flat, flat.new_zeros(most - len(flat))])
        everyone = mine.new_empty(self.line.size, most)
        dist.all_gather_into_tensor(everyone.view(-1), mine, group=self.line.group)
        outputs: list[StudentOutput] = []
        for rank, share in enumerate(self.shares):
            if rank == self.line.rank:
                outputs += own
                continue
            pieces = iter(everyone[rank, : sum(lengths[rank])].split(lengths[rank]))
            outputs += [self._received(pieces, own[0]) for _ in share]
        return outputs

    def _shown(self, output: StudentOutput) -> list[Tensor]:
        """The outputs of a student that the other ranks read."""
        shown = [output.logits_BC, output.features_BD]
        return [*shown, output.maps[-1].permute(0, 2, 3, 1)] if self.maps else shown

    def _lengths(self, student: int, like: StudentOutput) -> list[int]:
        B, C = like.logits_BC.shape
        lengths = [B * C, B * self.shape.feature_dims[student]]
        return [*lengths, like.maps[-1].numel()] if self.maps else lengths

    def _received(self, values: Iterator[Tensor], like: StudentOutput) -> StudentOutput:
        B = like.logits_BC.shape[0]
        logits_BC = next(values).view_as(like.logits_BC).to(like.logits_BC.dtype)
        features_BD = next(values).view(B, -1).to(like.features_BD.dtype)
        if not self.maps:
            return StudentOutput(logits_BC, features_BD, ())
        last_BCHW = like.maps[-1]  # those who read maps ask for equal students
        _, C, H, W = last_BCHW.shape
        map_BCHW = next(values).view(B, H, W, C).permute(0, 3, 1, 2).to(last_BCHW.dtype)
        return StudentOutput(logits_BC, features_BD, (map_BCHW,))
