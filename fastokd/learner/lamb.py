"""LAMB: Adam whose update of each parameter is scaled by the norm of that parameter.

You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962, algorithm 2, in the form of
timm's ``Lamb`` (NVIDIA's NVLAMB): gradients are first clipped by their global norm, moments are
corrected for their zero start, and parameters without decay aren't scaled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Lamb(torch.optim.Optimizer):
    """Reads nothing back from the device, and leaves a step out where ``found_inf`` isn't 0.

    For a parameter p with gradient g, clipped to ``max_grad_norm``::

        m <- beta1 m + (1 - beta1) g                    v <- beta2 v + (1 - beta2) g^2
        u  = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        p <- p - lr (|p| / |u|) u

    The ratio is 1 where a norm is 0, and for a group without decay.

    A group may have ``"units"``, for each parameter a number: norms are taken over the gradients of a
    unit, so that each student of a cohort is clipped as if it were trained alone.

    Args:
        params: parameters or groups; ``lr`` a number or a 0-d tensor.
        max_grad_norm: the norm that gradients are clipped to; None for no clipping.

    Attributes:
        found_inf: 0-d on the parameters' device; not 0: the next step changes nothing. None: not read.
    """

    # As torch's fused optimizers: whoever steps sets `found_inf` (optimizers.py).
    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; a parameter without gradient is left out."""
        assert closure is None
        groups = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        clipped = self._clipped(groups)
        for group, parameters in groups:
            if parameters:
                self._update(group, parameters, [clipped[p] for p in parameters])

    def _clipped(self, groups: list[tuple[Group, list[Tensor]]]) -> dict[Tensor, Tensor]:
        """Each parameter's gradient after clipping; zeros where the step isn't taken, so that no value
        which isn't finite reaches a state."""
        units: dict[int, dict[Tensor, Tensor]] = {}
        for group, parameters in groups:
            of = dict(zip(group["params"], group.get("units", ()), strict=False))
            for p in parameters:
                assert p.grad is not None
                units.setdefault(of.get(p, 0), {})[p] = p.grad
        clipped: dict[Tensor, Tensor] = {}
        for unit in units.values():
            gradients = list(unit.values())
            if self.max_grad_norm is not None:
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
                most = (norm / self.max_grad_norm).clamp_(min=1)
                gradients = list(torch._foreach_div(gradients, most))
            if self.found_inf is not None:
                zero, untaken = gradients[0].new_zeros(()), self.found_inf != 0
                gradients = [torch.where(untaken, zero, g) for g in gradients]
            clipped.update(zip(unit, gradients, strict=True))
        return clipped

    def _update(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        states = [self._state_of(p) for p in parameters]
        means, squares, counts = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        one = torch.ones_like(counts[0])
        taken = one if self.found_inf is None else (self.found_inf == 0).to(one.dtype)
        torch._foreach_add_(counts, [taken] * len(counts))
        # The parameters of a group have one count: they are trained from the same step on (build.py).
        # In float64, as 1 - beta^t has few digits in float32; an untaken first step counts as one.
        t = counts[0].double().clamp(min=1)
        kind = parameters[0].dtype
        beta1, beta2 = group["betas"]
        for moments, beta in ((means, beta1), (squares, beta2)):
            torch._foreach_mul_(moments, (beta ** taken.double()).to(kind))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, (1 - beta2**t).sqrt().to(kind))
        torch._foreach_add_(below, group["eps"])
        updates = list(torch._foreach_div(means, (1 - beta1**t).to(kind)))
        torch._foreach_div_(updates, below)
        rate = (taken * group["lr"]).to(kind)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            rates = _ratios(parameters, updates) * rate
            torch._foreach_mul_(updates, list(rates.unbind()))
        else:
            torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(parameters, updates)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state


def _ratios(parameters: list[Tensor], updates: list[Tensor]) -> Tensor:
    """``|p| / |u|`` of each, 1 where one of them is 0; ``[n]``."""
    above, below = (torch.stack(torch._foreach_norm(x)) for x in (parameters, updates))
    return torch.where((above > 0) & (below > 0), above / below, 1.0)
