"""OKDDip's loss from the peers' queries and keys, on a GPU: the scores are made in the kernel.

    scores_ab = query_a . key_b    between peers; 0 from the leader (the last student where there is
                                   one more than peers) to each peer; -inf to the leader
    d query_a = sum_b d scores_ab key_b,    d key_b = sum_a d scores_ab query_a

The rest, kernel included, is ``mixture_distillation.py``'s.
"""

from __future__ import annotations

import torch
from fastokd.kernels import _layout
from fastokd.kernels._launch import Loss, on_device
from fastokd.kernels._layout import empty_gradient
from fastokd.kernels._reduce import reduce
from fastokd.kernels.mixture_distillation import run
from torch import Tensor


@on_device
def launch(
    logits_SBC: Tensor,
    labels: Tensor,
    query_BPd: Tensor,
    key_BPd: Tensor,
    ce_weight_S: Tensor | None,
    kd_weight_S: Tensor | None,
    temperature_0d: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    temperature: float,
    mix: str,
    detach_targets: bool,
    label_smoothing: float,
    grad_logits: bool,
    grad_query: bool,
    grad_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastokd::peer_attention_distillation`` in two launches, the second a reduction.

    Returns:
        total, ce_S and kd_S (fp32), then gradients for an incoming gradient of 1: of the logits in
        fp32 where they are fp16 and else in their dtype, of query and key in fp32; ``[0]`` where
        not asked for.
    """
    none = logits_SBC.new_empty(0, dtype=torch.float32)
    width = query_BPd.shape[2]
    if width == 0:  # the kernel would take queries without a width for scores
        query_BPd, key_BPd = (x.new_zeros((*x.shape[:2], 1)) for x in (query_BPd, key_BPd))
    loss = Loss(
        _layout.weight(ce_weight_S, ce_weight),
        _layout.weight(kd_weight_S, kd_weight),
        _layout.weight(None, 0.0),
        (temperature_0d, float(temperature)),
        mix,
        detach_targets,
        float(label_smoothing),
    )
    gradients = (
        empty_gradient(logits_SBC) if grad_logits else None,
        None,
        none.new_empty(query_BPd.shape) if grad_query else None,
        none.new_empty(key_BPd.shape) if grad_key else None,
    )
    losses_3SB = run(
        logits_SBC,
        None,
        labels,
        query_BPd.contiguous(),
        key_BPd.contiguous(),
        loss,
        gradients,
    )
    total, ce_S, kd_S, _ = reduce(losses_3SB, *loss[:3], None)
    gz, _, g_query, g_key = (none if g is None else g for g in gradients)
    if width == 0:
        g_query, g_key = g_query[..., :0], g_key[..., :0]
    return total, ce_S, kd_S, gz, g_query, g_key
