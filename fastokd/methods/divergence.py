"""How far students are from a target: T^2 KL, DKD or DIST, of their logits or of standardised ones.

Only T^2 KL of the logits as they are is a term of ``mixture_distillation``. The others are added to it here: the
scores make the target (``mix="logits"``) or weigh the divergences from each source (``"pairwise"``), and targets
carry no gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.ops.correlation_distillation import correlation_losses
from fastokd.ops.decoupled_distillation import decoupled_losses
from fastokd.ops.fused_loss import Mix
from fastokd.ops.mixture_distillation import mixture_distillation

DivergenceName = Literal["kl", "dkd", "dist"]
# The weights of each and their published values.
WEIGHTS: dict[str, dict[str, float]] = {
    "kl": {},
    "dkd": {"alpha": 1.0, "beta": 8.0},
    "dist": {"beta": 1.0, "gamma": 1.0},
}


class Divergence:
    """T^2 KL, DKD (``alpha`` TCKD + ``beta`` NCKD) or DIST (``beta`` inter + ``gamma`` intra).

    Args:
        name: ``"kl"``, ``"dkd"`` or ``"dist"``.
        standardise: z-scores of student's and target's logits, each sample by its own mean and deviation
            over the classes, before the temperature (:func:`standardised`).
        mix: ``"logits"`` or ``"pairwise"``; ``"probs"`` only for the KL of the logits as they are.
        weights: those of the divergence; None for the published one.

    Raises:
        UserError: an unknown name, a weight of another divergence, mixed probabilities.
    """

    def __init__(
        self,
        name: str,
        *,
        standardise: bool = False,
        mix: Mix = "logits",
        impl: str = "auto",
        **weights: float | None,
    ) -> None:
        if name not in WEIGHTS:
            raise UserError(f"divergence is {name!r}: choose kl, dkd or dist")
        self.name = name
        self.standardise = standardise
        self.mix = mix
        self.impl = impl
        self.weights = dict(WEIGHTS[name])
        for key, value in weights.items():
            if value is None:
                continue
            if key not in self.weights:
                others = [other for other, has in WEIGHTS.items() if key in has]
                raise UserError(
                    f"{key} is {value}, but divergence is {name!r}, which has no such weight: leave it "
                    f"out, or set divergence to {' or '.join(others)}"
                )
            self.weights[key] = float(value)
        if mix == "probs" and not self.fused:
            what = "standardise_logits is true" if name == "kl" else f"divergence is {name!r}"
            raise UserError(
                f"mix is 'probs', but {what}, whose target is made of logits: choose logits or pairwise"
            )

    @property
    def fused(self) -> bool:
        """Whether ``mixture_distillation`` has it as its own term."""
        return self.name == "kl" and not self.standardise

    def check_labels(self, mixed_with: tuple[Tensor, Tensor] | None) -> None:
        """Raises where labels are mixed and DKD would need one."""
        if mixed_with is not None and self.name == "dkd":
            raise UserError(
                "divergence is 'dkd', which tells one class from the others, but the labels are mixed: set "
                "mixup and cutmix to 0, or divergence to kl or dist"
            )

    def to_target(
        self,
        logits_SBC: Tensor,
        target_SBC: Tensor,
        labels_B: Tensor,
        temperature: float,
        weight: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum over students, and each student's ``[S]`` unweighted and detached.

        ``target_SBC``: logits, ``[1, B, C]`` for all students or ``[S, B, C]``; ``weight``: a number, a 0-d
        tensor or ``[S]``.
        """
        if self.standardise:
            logits_SBC, target_SBC = standardised(logits_SBC), standardised(target_SBC.detach())
        if self.name == "kl":
            scores_SN = _one_source_each(logits_SBC, target_SBC)
            loss = mixture_distillation(
                logits_SBC,
                labels_B,
                scores_SN,
                extra_logits_EBC=target_SBC,
                ce_weight=0.0,
                kd_weight=weight,
                temperature=temperature,
                detach_targets=True,
                impl=self.impl,
            )
            return loss.total, loss.kd_S
        weights = {**self.weights, "temperature": temperature}
        if self.name == "dkd":
            loss_S = decoupled_losses(logits_SBC, target_SBC, labels_B, impl=self.impl, **weights)
        else:
            loss_S = correlation_losses(logits_SBC, target_SBC, impl=self.impl, **weights)
        return (loss_S * weight).sum(), loss_S.detach()

    def by_scores(
        self,
        logits_SBC: Tensor,
        extra_EBC: Tensor | None,
        scores: Tensor,
        labels_B: Tensor,
        temperature: float,
        weight: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`to_target` where ``scores`` mix the sources, students and then extras. A source at -inf
        contributes nothing, even where it is NaN; a row of -inf alone has no target, and its term is 0."""
        sources_NBC = logits_SBC.detach()
        if extra_EBC is not None:
            sources_NBC = torch.cat([sources_NBC, extra_EBC.detach().to(sources_NBC.dtype)])
        dtype = torch.promote_types(logits_SBC.dtype, torch.float32)
        scores = scores.detach().to(dtype)
        listens_S = (scores != -math.inf).any(-1).reshape(-1, len(logits_SBC)).any(0)
        # A row of -inf alone has no share in any source: its target is 0, its weight, too.
        shares = torch.where(listens_S[:, None], scores, 0.0).softmax(-1) * listens_S[:, None]
        weight = listens_S.to(dtype) * weight
        if self.mix == "pairwise":
            total, kd_S = self._pairwise(
                logits_SBC, sources_NBC, shares, labels_B, temperature, weight
            )
        else:
            target_SBC = _mixed(shares, sources_NBC)
            total, kd_S = self.to_target(logits_SBC, target_SBC, labels_B, temperature, weight)
        return total, kd_S * listens_S

    def _pairwise(
        self,
        logits_SBC: Tensor,
        sources_NBC: Tensor,
        shares_SN: Tensor,
        labels_B: Tensor,
        temperature: float,
        weight_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if shares_SN.dim() == 3:
            raise UserError(
                f"mix is 'pairwise', but the scores differ between samples, and divergence {self.name!r} "
                "couples a batch or has one weight a source: set mix to logits"
            )
        parts = []
        for source_BC, share_S in zip(sources_NBC, shares_SN.unbind(1), strict=True):
            target_SBC = torch.where(share_S[:, None, None] == 0, 0.0, source_BC)
            weight = share_S * weight_S
            parts.append(self.to_target(logits_SBC, target_SBC, labels_B, temperature, weight))
        total = torch.stack([part for part, _ in parts]).sum()
        kd_NS = torch.stack([kd_S for _, kd_S in parts])
        return total, (kd_NS * shares_SN.T).sum(0)


def standardised(logits_SBC: Tensor) -> Tensor:
    """z-scores over the classes, (z - mean) / (deviation + 1e-7) (Sun et al., CVPR 2024; the deviation is
    their code's, over C - 1); fp32, float64 for float64."""
    dtype = torch.promote_types(logits_SBC.dtype, torch.float32)
    z_SBC = logits_SBC.to(dtype)
    centred_SBC = z_SBC - z_SBC.mean(-1, keepdim=True)
    return centred_SBC / (z_SBC.std(-1, keepdim=True) + 1e-7)


def _one_source_each(logits_SBC: Tensor, target_SBC: Tensor) -> Tensor:
    """``[S, S + targets]`` scores: each student listens to its target alone."""
    students, targets = len(logits_SBC), len(target_SBC)
    own = torch.eye(students, dtype=torch.bool, device=logits_SBC.device)
    to_target = own if targets == students else torch.ones_like(own[:, :1])
    listens_SN = torch.cat([torch.zeros_like(own), to_target], 1)
    return torch.where(listens_SN, 0.0, -math.inf)


def _mixed(shares: Tensor, sources_NBC: Tensor) -> Tensor:
    """The mixed logits, ``[S, B, C]``, of ``shares [S, N]`` or ``[B, S, N]``."""
    dtype = torch.promote_types(shares.dtype, sources_NBC.dtype)
    shares_SNB1 = (shares.permute(1, 2, 0) if shares.dim() == 3 else shares[..., None])[..., None]
    # Selected, not multiplied: 0 * NaN is NaN.
    parts = [
        torch.where(share_SB1 == 0, 0.0, share_SB1 * source_BC)
        for share_SB1, source_BC in zip(shares_SNB1.to(dtype).unbind(1), sources_NBC, strict=True)
    ]
    return torch.stack(parts).sum(0)
