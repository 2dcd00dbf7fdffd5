"""FFSD (Li et al., arXiv 2103.14473): diverse students, and a leader that learns from their fusion.

Scores: a student listens to each other student with equal weight, pairwise; the fusion module to the
students' mean logits; the leader to the fusion module. The map losses (``ops/attention.py``) make the
students' attention differ, pull each student's earlier maps towards those that its decoder computes
from a better last map, and pull the leader's last map towards the fused map.

Every target is detached, so that one backward of the sum gives each network the gradient of its own
published loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastokd.cohort import CohortOutput, CohortShape, side_by_side
from fastokd.errors import UserError
from fastokd.methods.base import Method, MethodLoss, Needs, OptimGroup, Progress, no_one
from fastokd.methods.ffsd_modules import Decoder, Fusion, Squeeze
from fastokd.methods.label_loss import Mixed
from fastokd.ops import (
    attention_diversity,
    attention_transfer,
    feature_transfer,
    mixture_distillation,
    shifted_map,
)

LEADER = "leader"
# A third of a map's positions must be at least one.
LEAST_PLACES = 3


class OfMaps(NamedTuple):
    """What is computed of one student's maps: its losses, and of the leader's the fusion's logits."""

    diversity: Tensor | None = None
    fusion: Tensor | None = None
    decoders: Tensor | None = None
    fusion_BC: Tensor | None = None


class FFSD(Method):
    """The published losses of the students, the fusion module, the leader and the decoders, summed.

    Args:
        temperature: T.
        lambda_diversity: weighs the losses by which a student's attention differs from the previous one's.
        lambda_fusion: weighs the leader's losses on maps.
        lambda_self_distillation: weighs the decoders' losses. The recipe's ramp multiplies all
            three lambdas, and no logit term.

    Raises:
        UserError: fewer than two students and a leader, students whose maps differ, maps that
            don't double in height and width from stage to stage.
    """

    needs = Needs(
        sharing=("network",),
        min_students=3,
        leader=True,
        maps=True,
        own_rows=True,
        running_statistics=True,
        label_loss=True,
        mixed_labels=True,
    )

    pairs_SN: Tensor
    fusion_1N: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 2.0,
        lambda_diversity: float = 1e-5,
        lambda_fusion: float = 10.0,
        lambda_self_distillation: float = 1000.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(shape)
        self.temperature = temperature
        self.lambda_diversity = lambda_diversity
        self.lambda_fusion = lambda_fusion
        self.lambda_self_distillation = lambda_self_distillation
        self.impl = impl

        channels = _channels(shape)
        last, together = channels[-1], channels[-1] * self.peers
        self.fusion = Fusion(together, last, shape.num_classes, impl)
        self.transfusion = Squeeze(last, together, impl)
        # The first student has no previous one to differ from, and so no decoder.
        named = [*map(str, range(1, self.peers)), LEADER]
        self.decoders = nn.ModuleDict({name: Decoder(channels, impl) for name in named})

        self._own_S: Tensor | None = None
        pairs_SN, fusion_1N = _scores(self.peers)
        self.register_buffer("pairs_SN", pairs_SN, persistent=False)
        self.register_buffer("fusion_1N", fusion_1N, persistent=False)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        own = range(self.shape.students) if out.own is None else out.own
        lasts = [maps[-1].detach() for maps in out.maps[: self.peers]]
        calls = [(student, out.maps[student], lasts) for student in own]
        of_maps = side_by_side(self._of_maps, calls, out.streams)
        # The leader is the last student.
        fusion_BC = of_maps[-1].fusion_BC
        total, parts = self._logit_losses(out, fusion_BC, labels_B, own, progress.mixed_with)

        diversity, fusion, decoders = (total.new_zeros(()) for _ in range(3))
        for losses in of_maps:
            if losses.diversity is not None:
                diversity = diversity + losses.diversity
            if losses.fusion is not None:
                fusion = losses.fusion
            if losses.decoders is not None:
                decoders = decoders + losses.decoders

        maps = (
            self.lambda_diversity * diversity
            + self.lambda_fusion * fusion
            + self.lambda_self_distillation * decoders
        )
        parts |= {
            "diversity_maps": diversity.detach(),
            "fusion_maps": fusion.detach(),
            "decoder_maps": decoders.detach(),
        }
        return MethodLoss(total + progress.ramp.to(maps.dtype) * maps, parts)

    def _logit_losses(
        self,
        out: CohortOutput,
        fusion_BC: Tensor | None,
        labels_B: Tensor,
        own: range,
        mixed_with: Mixed,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """CE and T^2 KL of the students ``own``, and of the fusion module where the leader is among them."""
        whole = len(own) == self.shape.students
        weight: Tensor | float = 1.0 if whole else self._own(own, labels_B.device)
        # Only the leader reads the extra source.
        source_BC = out.logits_SBC[0] if fusion_BC is None else fusion_BC
        students = mixture_distillation(
            out.logits_SBC,
            labels_B,
            self.pairs_SN,
            extra_logits_EBC=source_BC.detach()[None],
            kd_weight=weight,
            temperature=self.temperature,
            mix="pairwise",
            detach_targets=True,
            impl=self.impl,
            **self.label_loss.arguments(labels_B, mixed_with, weight),
        )
        total, ce_S = self.label_loss.losses(students, out.logits_SBC, labels_B, mixed_with, weight)
        parts = {"ce_S": ce_S * weight, "kd_S": students.kd_S * weight}
        if fusion_BC is None:
            nothing = torch.zeros_like(parts["ce_S"][0])
            return total, {**parts, "fusion_ce": nothing, "fusion_kd": nothing}
        fusion = mixture_distillation(
            fusion_BC[None],
            labels_B,
            self.fusion_1N,
            extra_logits_EBC=out.logits_SBC[: self.peers].detach(),
            temperature=self.temperature,
            detach_targets=True,
            impl=self.impl,
            **self.label_loss.arguments(labels_B, mixed_with),
        )
        of_fusion, ce_1 = self.label_loss.losses(fusion, fusion_BC[None], labels_B, mixed_with)
        parts |= {"fusion_ce": ce_1[0], "fusion_kd": fusion.kd_S[0]}
        return total + of_fusion, parts

    def _own(self, own: range, device: torch.device) -> Tensor:
        """1 for the students of this rank, made once."""
        if self._own_S is None:
            self._own_S = torch.zeros(self.shape.students, device=device)
            self._own_S[own.start : own.stop] = 1.0
        return self._own_S

    def _decoder(self, student: int) -> Decoder:
        name = LEADER if student == self.peers else str(student)
        decoder = self.decoders[name]
        assert isinstance(decoder, Decoder)
        return decoder

    def _of_maps(self, student: int, maps: tuple[Tensor, ...], lasts: Sequence[Tensor]) -> OfMaps:
        """The losses of one student's ``maps``; ``lasts``: the last maps of all but the leader."""
        if student == 0:
            return OfMaps()
        if student < self.peers:
            diversity = self._apart(student, maps, lasts[student - 1])
            return OfMaps(diversity=diversity, decoders=self._reconstruction(student, maps))
        fused_BCHW, fusion_BC = self.fusion.fuse(lasts)
        fusion = self._follow(maps, fused_BCHW.detach(), torch.cat(tuple(lasts), dim=1))
        decoders = self._reconstruction(student, maps)
        return OfMaps(fusion=fusion, decoders=decoders, fusion_BC=fusion_BC)

    def _apart(self, student: int, maps: tuple[Tensor, ...], other_BCHW: Tensor) -> Tensor:
        """The diversity losses of a student: its attention differs from the previous student's."""
        shifted_BCHW = shifted_map(other_BCHW, impl=self.impl)
        along = self._self_distillation(student, maps, shifted_BCHW)
        return attention_diversity(maps[-1], other_BCHW, impl=self.impl) + along

    def _follow(
        self, maps: tuple[Tensor, ...], fused_BCHW: Tensor, together_BKHW: Tensor
    ) -> Tensor:
        """The leader's map losses: attention to the fused map, and of its transfusion to all students'."""
        alike = attention_transfer(maps[-1], fused_BCHW, impl=self.impl)
        spread = attention_transfer(self.transfusion(maps[-1]), together_BKHW, impl=self.impl)
        return alike + spread + self._self_distillation(self.peers, maps, fused_BCHW)

    def _self_distillation(
        self, student: int, maps: tuple[Tensor, ...], source_BCHW: Tensor
    ) -> Tensor:
        """Attention transfer of the earlier maps to those that the decoder computes of ``source_BCHW``."""
        decoded = self._decoder(student).decode(source_BCHW)
        return _sum(
            attention_transfer(x_BCHW, y_BCHW, impl=self.impl)
            for x_BCHW, y_BCHW in zip(maps[:-1], decoded, strict=True)
        )

    def _reconstruction(self, student: int, maps: tuple[Tensor, ...]) -> Tensor:
        """The loss of the student's decoder, which computes the earlier maps from the last."""
        decoded = self._decoder(student)(maps[-1].detach())
        return _sum(
            feature_transfer(x_BCHW, y_BCHW.detach(), impl=self.impl)
            + attention_transfer(x_BCHW, y_BCHW.detach(), impl=self.impl)
            for x_BCHW, y_BCHW in zip(decoded, maps[:-1], strict=True)
        )

    def belongs_to(self, name: str) -> int:
        """Each decoder is its student's; fusion module, transfusion and the rest the leader's."""
        module, owner, *_ = name.split(".")
        return int(owner) if module == "decoders" and owner != LEADER else self.peers

    def optim_groups(self) -> Iterable[OptimGroup]:
        """The transfusion with the leader's settings, the fusion module with less decay, decoders by Adam."""
        return [
            OptimGroup(list(self.transfusion.parameters())),
            OptimGroup(list(self.fusion.parameters()), weight_decay=1e-5),
            OptimGroup(
                list(self.decoders.parameters()),
                optimizer="adam",
                lr=1e-3,
                weight_decay=1e-4,
                warm_up=False,
            ),
        ]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(terms)).sum()


def _channels(shape: CohortShape) -> list[int]:
    """The channels of the students' maps; raises where decoders and fusion can't read them."""
    first = shape.map_shapes[0]
    if any(maps != first for maps in shape.map_shapes):
        raise UserError(
            "FFSD's fusion module and decoders read maps of one shape, but its students' are "
            f"{' and '.join(str(maps) for maps in dict.fromkeys(shape.map_shapes))}: "
            "use students of one architecture"
        )
    if len(first) < 2:
        raise UserError(
            f"FFSD needs students with maps of at least 2 stages, and these have {len(first)}"
        )
    for (_, height, width), (_, next_height, next_width) in pairwise(first):
        if (height, width) != (2 * next_height, 2 * next_width):
            raise UserError(
                f"FFSD's decoders double a map's height and width, but the students' maps are "
                f"{', '.join(f'{h} x {w}' for _, h, w in first)}: choose another student, or images "
                "of another size"
            )
    _, height, width = first[-1]
    if height * width < LEAST_PLACES:
        raise UserError(
            f"FFSD moves a third of a map's positions, but the students' last map is {height} x {width}: "
            "choose larger images or another student"
        )
    return [channels for channels, _, _ in first]


def _scores(peers: int) -> tuple[Tensor, Tensor]:
    """Scores of students and leader, ``[S, S + 1]``, whose extra source is the fusion module; and of the
    fusion module, ``[1, 1 + P]``, whose extra sources are the students."""
    pairs_SN = no_one(peers + 1, peers + 2)
    pairs_SN[:peers, :peers] = 0.0
    pairs_SN[:peers, :peers].fill_diagonal_(-torch.inf)
    pairs_SN[peers, peers + 1] = 0.0
    fusion_1N = no_one(1, peers + 1)
    fusion_1N[0, 1:] = 0.0
    return pairs_SN, fusion_1N
