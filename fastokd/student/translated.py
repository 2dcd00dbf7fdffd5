"""A teacher on the students' batches: images in its own terms, logits of the students' classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.data.preprocessing import Preprocessing


class Translated(nn.Module):
    """A classifier that was trained on images normalised otherwise, of another size, or of more classes.

    ``[B, 3, H, W]`` normalised by ``ours`` to logits ``[B, C]``: the mean and deviation are replaced by
    ``theirs``, the images are resized to its input size by antialiased bilinear interpolation (as
    torchvision's ``resize`` does) and the logits of ``places`` are selected.

    Args:
        net: ``[B, 3, S, S] -> [B, N]``.
        places: the place of each of the C classes among the N; None for all in the same order.
    """

    scale_C11: Tensor | None
    shift_C11: Tensor | None
    places_C: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        theirs: Preprocessing,
        ours: Preprocessing,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        differing = theirs.differences(ours)
        self.size = theirs.input_size if "input_size" in differing else None
        scale = shift = None
        if "mean" in differing or "std" in differing:
            mean, std, their_mean, their_std = (
                torch.tensor(values, dtype=torch.float64)[:, None, None]
                for values in (ours.mean, ours.std, theirs.mean, theirs.std)
            )
            scale, shift = (std / their_std).float(), ((mean - their_mean) / their_std).float()
        self.register_buffer("scale_C11", scale, persistent=False)
        self.register_buffer("shift_C11", shift, persistent=False)
        chosen = None if places is None else torch.tensor(places)
        self.register_buffer("places_C", chosen, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.scale_C11 is not None and self.shift_C11 is not None:
            x_BCHW = torch.addcmul(self.shift_C11, x_BCHW, self.scale_C11)
        if self.size is not None and tuple(x_BCHW.shape[2:]) != (self.size, self.size):
            if x_BCHW.dtype in (torch.bfloat16, torch.float16):  # resized in full precision
                x_BCHW = x_BCHW.float()
            size = (self.size, self.size)
            x_BCHW = F.interpolate(
                x_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False
            )
        logits_BN: Tensor = self.net(x_BCHW)
        return logits_BN if self.places_C is None else logits_BN.index_select(1, self.places_C)


class Averaged(nn.Module):
    """The mean of several teachers' logits ``[B, C]``.

    With the softmax of any temperature it is the normalised geometric mean of the teachers'
    probabilities (Hinton et al., 2015, section 1 of "Distilling the knowledge in a neural
    network").
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.stack([teacher(x_BCHW) for teacher in self.teachers]).mean(0)
