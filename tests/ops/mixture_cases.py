"""Drawn calls of mixture_distillation, and the budget that a fast implementation's errors have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastokd.ops import mixture_distillation
from tests.ops.poison import poisoned

NAMES = ("total", "ce_S", "kd_S", "grad_logits", "grad_extra", "grad_scores")


@dataclass(frozen=True)
class Case:
    """The arguments of one call; the loss's incoming gradient besides."""

    logits_SBC: Tensor
    extra_EBC: Tensor | None
    labels_B: Tensor
    scores: Tensor
    ce_weight: float | Tensor = 1.0
    kd_weight: float | Tensor = 0.7
    mixture_ce_weight: float | Tensor = 0.0
    temperature: float | Tensor = 3.0
    mix: str = "logits"
    detach_targets: bool = False
    label_smoothing: float = 0.0
    mixed_with: tuple[Tensor, Tensor] | None = None
    sample_weight_B: Tensor | None = None
    incoming: float = 1.0
    asks: tuple[bool, bool, bool] = (True, True, True)

    def double(self) -> Case:
        """The same numbers in float64."""
        return replace(
            self,
            logits_SBC=self.logits_SBC.double(),
            extra_EBC=None if self.extra_EBC is None else self.extra_EBC.double(),
            scores=self.scores.double(),
        )

    def run(self, impl: str) -> dict[str, Tensor]:
        """The losses, and the gradients that are asked for (by the names in ``NAMES``)."""
        leaves: list[Tensor | None] = []
        for x, asked in zip((self.logits_SBC, self.extra_EBC, self.scores), self.asks, strict=True):
            # Detached, not cloned: the strides are part of the case.
            leaves.append(None if x is None else x.detach().requires_grad_(asked))
        logits_SBC, extra_EBC, scores = leaves
        assert logits_SBC is not None
        assert scores is not None
        loss = mixture_distillation(
            logits_SBC,
            self.labels_B,
            scores,
            extra_logits_EBC=extra_EBC,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            mixture_ce_weight=self.mixture_ce_weight,
            temperature=self.temperature,
            mix=self.mix,  # type: ignore[arg-type]
            detach_targets=self.detach_targets,
            label_smoothing=self.label_smoothing,
            mixed_with=self.mixed_with,
            sample_weight_B=self.sample_weight_B,
            impl=impl,
        )
        found = dict(zip(NAMES, loss, strict=False))
        wanted = {
            name: leaf
            for name, leaf in zip(NAMES[3:], leaves, strict=True)
            if leaf is not None and leaf.requires_grad
        }
        if loss.total.requires_grad:
            incoming = torch.full_like(loss.total, self.incoming)
            gradients = torch.autograd.grad(
                loss.total, list(wanted.values()), incoming, allow_unused=True
            )
            for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
                found[name] = torch.zeros_like(leaf) if gradient is None else gradient
                assert found[name].dtype == leaf.dtype
        return {name: x.detach() for name, x in found.items()}


def draw(
    S: int = 3,
    B: int = 4,
    C: int = 10,
    E: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    batched: bool = True,
    soft: bool = False,
    mixed: bool = False,
    weighted: bool = False,
    listens: float = 1.0,
    padding: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: object,
) -> Case:
    """Logits with softmaxes neither flat nor one-hot; rows ``padding`` apart; a part of the scores
    is -inf, a whole row's among them now and then. Shares of second labels include 0 and 1."""
    g = torch.Generator().manual_seed(hash((S, B, C, E, seed)) % 2**31)

    def rows(count: int) -> Tensor:
        wide = 2 * torch.randn(count, B, C + padding, generator=g) + torch.randn(1, generator=g)
        return wide.to(device, dtype)[..., :C]

    scores = torch.randn(*([B] if batched else []), S, S + E, generator=g)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=g) > listens, -math.inf)
    labels_B = torch.randint(C, (B,), generator=g)
    if B:
        labels_B[0] = C - 1
    if soft:
        labels_B = torch.softmax(torch.randn(B, C, generator=g), -1)
    logits_SBC, extra_EBC = rows(S), rows(E) if E else None
    if mixed:
        share2_B = torch.rand(B, generator=g)
        share2_B[1:3] = torch.tensor([0.0, 1.0])[: max(B - 1, 0)]
        labels2_B = torch.randint(C, (B,), generator=g)
        options["mixed_with"] = labels2_B.to(device), share2_B.to(device)
    if weighted:
        options["sample_weight_B"] = (2 * torch.rand(B, generator=g)).to(device)
    return Case(logits_SBC, extra_EBC, labels_B.to(device), scores.to(device), **options)  # type: ignore[arg-type]


def assert_within_budget(case: Case, impl: str = "cpp") -> None:
    """``case`` by ``impl``, as :func:`assert_errors_within_budget` has it."""
    ours = case.run(impl)
    with poisoned(False):
        theirs, exact = case.run("torch"), case.double().run("torch")
    _, B, C = case.logits_SBC.shape
    T = float(case.temperature)
    assert_errors_within_budget(ours, theirs, exact, B, C, impl, T, abs(case.incoming))


def assert_errors_within_budget(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    B: int,
    C: int,
    impl: str,
    temperature: float = 3.0,
    incoming: float = 1.0,
) -> None:
    """Neither one element nor the whole is further from float64 than plain PyTorch's, plus a
    rounding or two; a gradient of zeros where there should be small ones is far from it."""
    assert ours.keys() == exact.keys()
    fp32 = torch.finfo(torch.float32).eps
    # Triton's interpreter adds up a row of classes one after another, and cuts a float32 off where it
    # stores a bfloat16; a GPU does neither.
    terms, cut = (max(8.0, 4 * math.log(C)), 1.5) if impl == "triton" else (8.0, 1.0)
    for name, x in exact.items():
        if not x.numel():
            continue
        error = (ours[name].double() - x).abs()
        budget = (theirs[name].double() - x).abs()
        # The incoming gradient meets a bfloat16 that is rounded already.
        rounding = torch.finfo(ours[name].dtype).eps
        tolerance = 8 * fp32 * x.abs().max() + cut * rounding * x.abs()
        # Even where all is 0 there are differences: T^2 log t - log q, and their gradients; T q - t.
        probabilities = fp32 * temperature * max(1.0, incoming)
        logs = terms * probabilities * temperature
        probabilities /= max(B, 1)
        tolerance = tolerance + (probabilities if name in NAMES[3:5] else logs)
        worst = (error - budget - tolerance).max().item()
        assert worst <= 0, f"{name} is {worst:.3g} beyond the budget of {budget.max().item():.3g}"
        if name.startswith("grad") and name != "grad_scores":  # of those there are too few
            limit = 1.5 * _rms(budget) + (2 * fp32 + rounding / 2) * _rms(x) + probabilities / 4
            assert _rms(error) <= limit, f"{name}: RMS {_rms(error):.3g}, the limit is {limit:.3g}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_second_labels_may_be_out_of_range(case: Case, impl: str) -> None:
    """An id out of range is NaN for its sample where its share isn't 0, and counts for nothing there.

    ``case``: at least 4 samples with mixed labels, the second one's share 0 and the third one's 1.
    """
    assert case.mixed_with is not None
    labels2_B, share2_B = case.mixed_with
    assert share2_B[1:3].tolist() == [0.0, 1.0]
    before = case.run(impl)
    C = case.logits_SBC.shape[2]
    for wrong in (C, -1, 2**40):
        out = case.labels_B.clone(), labels2_B.clone()
        out[0][2] = out[1][1] = wrong  # each with a share of 0
        found = replace(case, labels_B=out[0], mixed_with=(out[1], share2_B)).run(impl)
        for name, x in before.items():
            assert torch.equal(found[name], x), name
    for wrong, which, sample in ((C, 0, 0), (-1, 1, 3), (2**40, 0, 1), (C, 1, 2)):
        out = case.labels_B.clone(), labels2_B.clone()
        out[which][sample] = wrong
        found = replace(case, labels_B=out[0], mixed_with=(out[1], share2_B)).run(impl)
        others = [b for b in range(4) if b != sample]
        assert found["total"].isnan()
        assert found["grad_logits"][:, sample].isnan().all()
        assert found["grad_logits"][:, others].isfinite().all()
