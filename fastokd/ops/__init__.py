"""The fused ops: one signature each, a readable reference, and the fast paths."""

from fastokd.host.cpus import settle_threads
from fastokd.ops.attention import (
    attention_diversity,
    attention_map,
    attention_transfer,
    shifted_map,
)
from fastokd.ops.correlation_distillation import correlation_distillation
from fastokd.ops.decoupled_distillation import decoupled_distillation
from fastokd.ops.feature_transfer import feature_transfer
from fastokd.ops.fused_bn_act import fused_bn_act, norm_act
from fastokd.ops.fusion_step import fusion_step
from fastokd.ops.mixture_distillation import MixtureLoss, mixture_distillation
from fastokd.ops.mutual_contrast import Contrasts, mutual_contrast
from fastokd.ops.peer_attention_distillation import peer_attention_distillation

settle_threads()

__all__ = [
    "Contrasts",
    "MixtureLoss",
    "attention_diversity",
    "attention_map",
    "attention_transfer",
    "correlation_distillation",
    "decoupled_distillation",
    "feature_transfer",
    "fused_bn_act",
    "fusion_step",
    "mixture_distillation",
    "mutual_contrast",
    "norm_act",
    "peer_attention_distillation",
    "shifted_map",
]
