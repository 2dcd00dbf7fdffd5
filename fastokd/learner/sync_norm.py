"""BatchNorm over the batch of all ranks: ``--sync-bn``.

With n_r values a channel on rank r, of mean m_r and biased variance v_r, and N = sum n_r:

    m = sum_r n_r m_r / N        v = sum_r n_r (v_r + (m_r - m)^2) / N

The backward needs two sums over all ranks, of dy and of dy (x - m). torch's SyncBatchNorm does the
same, but only on GPUs; this one also runs with gloo, and includes the residual and ReLU of a
``NormAct``. It costs one more pass over the maps than the fused norm, and two collectives a norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort import Cohort
from fastokd.cohort.layers import is_exactly, replace
from fastokd.distributed.ranks import Line, Ranks
from fastokd.errors import UserError
from fastokd.models.layers import NormAct

TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise(cohort: Cohort, method: nn.Module, ranks: Ranks) -> None:
    """Has every norm of cohort and method normalise over the batch of all ranks in training.

    Raises:
        UserError: each rank has the whole batch; a norm has a ``forward`` of its own.
    """
    if ranks.data.size == 1:
        raise UserError(
            "sync_bn is asked for, but every norm sees the whole batch already: leave --sync-bn out"
        )
    for name, module in (*cohort.named_modules(), *method.named_modules()):
        if is_exactly(module, NormAct, *TORCHS):
            relu = isinstance(module, NormAct) and module.relu
            replace(module, SyncNorm, line=ranks.data, relu=relu)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"sync_bn is asked for, but {name} is a {type(module).__name__}, a norm with code of "
                "its own: leave --sync-bn out"
            )


class SyncNorm(nn.modules.batchnorm._BatchNorm):
    """A norm over the batch of all ranks of ``line``, with the residual and ReLU of a ``NormAct``."""

    line: Line
    relu: bool

    def forward(self, x: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        y = sync_norm(self, x, line=self.line)
        if residual_BCHW is not None:
            y = y + residual_BCHW
        return F.relu(y) if self.relu else y


def sync_norm(module: Any, x: Tensor, *, line: Line) -> Tensor:
    """The norm of ``x`` ``[B, C, ...]``, over all ranks of ``line`` in training."""
    if not module.training:
        state = (module.running_mean, module.running_var, module.weight, module.bias)
        return F.batch_norm(x, *state, training=module.running_mean is None, eps=module.eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight_C, bias_C = module.weight, module.bias
    if weight_C is None:
        weight_C, bias_C = x.new_ones(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
    y: Tensor
    y, mean_C, variance_C, count = _SyncNorm.apply(x, weight_C, bias_C, module.eps, line.group)
    if module.running_mean is None:
        return y
    with torch.no_grad():
        tracked = module.num_batches_tracked.add_(1)
        for running_C, now_C in (
            (module.running_mean, mean_C),
            (module.running_var, variance_C * (count / (count - 1))),
        ):
            momentum = module.momentum
            if momentum is None:  # the mean over all batches
                momentum = tracked.to(running_C.dtype).reciprocal()
            running_C.lerp_(now_C.to(running_C.dtype), momentum)
    return y


class _SyncNorm(torch.autograd.Function):
    """The equations above; statistics in fp32 at least."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dims = [0, *range(2, x.dim())]
        variance_C, mean_C = torch.var_mean(x.to(wide), dims, correction=0)
        count_1 = variance_C.new_full((1,), x.numel() / x.shape[1])
        mine = torch.cat([mean_C, variance_C, count_1])
        everyone = mine.new_empty(dist.get_world_size(group), len(mine))
        dist.all_gather_into_tensor(everyone.view(-1), mine, group=group)
        mean_RC, variance_RC, count_R1 = everyone.split([len(mean_C), len(mean_C), 1], dim=1)
        count = count_R1.sum()
        mean_C = (count_R1 * mean_RC).sum(0) / count
        variance_C = (count_R1 * (variance_RC + (mean_RC - mean_C).square())).sum(0) / count
        scale_C = torch.rsqrt(variance_C + eps)
        ctx.save_for_backward(x, weight_C, mean_C, scale_C, count)
        ctx.group = group
        y = _per_channel(x, weight_C * scale_C, bias_C - mean_C * weight_C * scale_C)
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y, mean_C, variance_C, count

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, scale_C, count = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        wide = mean_C.dtype
        centred = x.to(wide) - _shaped(mean_C, x)
        grad = grad_y.to(wide)
        sums_2C = torch.stack([grad.sum(dims), (grad * centred).sum(dims)])
        mine_2C = sums_2C.clone()
        dist.all_reduce(sums_2C, group=ctx.group)
        mean_grad_C, along_C = sums_2C / count
        inner = grad - _shaped(mean_grad_C, x) - centred * _shaped(along_C * scale_C.square(), x)
        grad_x = inner * _shaped(weight_C * scale_C, x)
        # DDP averages these two over ranks.
        return grad_x.to(x.dtype), mine_2C[1] * scale_C, mine_2C[0], None, None


def _shaped(value_C: Tensor, like: Tensor) -> Tensor:
    return value_C.view(1, -1, *[1] * (like.dim() - 2))


def _per_channel(x: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    return (x.to(scale_C.dtype) * _shaped(scale_C, x) + _shaped(shift_C, x)).to(x.dtype)
