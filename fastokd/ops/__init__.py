"""The fused ops: one signature each, a readable reference, and the fast paths."""

from fastokd.ops.mixture_distillation import MixtureLoss, mixture_distillation

__all__ = ["MixtureLoss", "mixture_distillation"]
