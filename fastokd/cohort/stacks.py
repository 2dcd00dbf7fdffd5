"""The tensors of equal students in one memory, which an engine that stacks them reads without a copy.

``grouped`` and ``vmap`` compute with stacked tensors ``[S, ...]``. When such an engine is set, each
student's parameters and buffers are moved into the slices of stacked ones. The students' own objects
stay, so optimizers, DDP's hooks, state dicts and checkpoints see no difference: a parameter stays a
leaf and gets its slice of the stacked gradient, a running statistic is updated by the stacked norm.

Each student's tensor has a storage of its own, which ends with its slice. So to save or to copy one
student doesn't take the others' memory, and formats that refuse tensors which share memory take it.

Tensors that were moved since (``.to()`` of one student, a deep copy, ``load_state_dict(assign=True)``)
are stacked by a copy in each forward, until the engine is set again. So they are in a compiled step,
where the compiler may fuse that copy, and under ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


class Stack:
    """One parameter or buffer of S equal layers, ``[S, ...]``.

    Attributes:
        owns_gradient: no other tensor's gradient is the same memory. In a network of others' it may be:
            of ``bias + other_bias`` both have one gradient.
        shadow: within a forward, what is to be computed with instead: a cast (``shadows.py``).
    """

    def __init__(
        self, layers: Sequence[nn.Module], name: str, *, owns_gradient: bool = True
    ) -> None:
        self.layers, self.name, self.owns_gradient = tuple(layers), name, owns_gradient
        self.shadow: Tensor | None = None
        self._whole: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own, which are joined when its engine is set."""
        return self.__dict__ | {"_whole": None, "shadow": None}

    def join(self) -> None:
        """Moves the layers' tensors into one memory, unless they are there or differ in layout."""
        parts = self.parts()
        if self._joined(parts):
            return
        self._whole = None
        first = parts[0]
        layouts = {(x.shape, x.stride(), x.dtype, x.device) for x in parts}
        if len(layouts) > 1 or first.is_meta or not _is_dense(first):
            return
        # DLPack takes tensors of the current GPU only.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(first):
            size = first.numel()
            whole = first.new_empty_strided((len(parts), *first.shape), (size, *first.stride()))
            for part, place in zip(parts, whole, strict=True):
                place.copy_(part)
                part.data = _alone(place)
        self._whole = whole

    def __call__(self) -> Tensor:
        """The stacked tensor; its gradient goes to the layers' parameters."""
        if self.shadow is not None:
            return self.shadow
        parts = self.parts()
        if self._joined(parts):
            assert self._whole is not None
            trained = any(part.requires_grad for part in parts)
            whole = self._whole
            return _Whole.apply(whole, self.owns_gradient, *parts) if trained else whole
        if parts[0].dim():
            return torch.cat(parts).unflatten(0, (len(parts), -1))  # cat keeps channels-last
        return torch.stack(parts)

    def parts(self) -> list[Tensor]:
        """The layers' own tensors."""
        return [getattr(layer, self.name) for layer in self.layers]

    def in_place(self) -> list[Tensor]:
        """The tensors to write in place: the stacked one, or the layers' own."""
        parts = self.parts()
        return [self._whole] if self._whole is not None and self._joined(parts) else parts

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Sets the layers' tensors to ``values``, which may be what :meth:`__call__` returned."""
        parts = self.parts()
        whole = self._whole
        if whole is None or not self._joined(parts) or _place(values) != _place(whole):
            torch._foreach_copy_(parts, list(values.unbind()))

    def _joined(self, parts: list[Tensor]) -> bool:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if self._whole is None:
            return False
        first, step = _place(self._whole), self._whole.nbytes // len(parts)
        return [_place(part) for part in parts] == [first + s * step for s in range(len(parts))]


class _Whole(torch.autograd.Function):
    """``(whole, owns_gradient, *parts) -> whole``; each of the parts, its slices, gets its slice of the
    gradient."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, owns_gradient: bool, *parts: Tensor) -> Tensor:
        ctx.owns_gradient, ctx.strides = owns_gradient, whole.stride()
        # Autograd then refuses a backward after a write to one of them, as it does for the loop's
        # tensors; it doesn't see that they are whole's memory.
        ctx.save_for_backward(*parts)
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        # Autograd gives a leaf a gradient in its own layout as it is, and copies another.
        layout = zip(grad.shape, grad.stride(), ctx.strides, strict=True)
        if not ctx.owns_gradient or any(n > 1 and step != own for n, step, own in layout):
            grad = grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)
        return None, None, *grad.unbind()


def _is_dense(x: Tensor) -> bool:
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return span == x.numel()


def _alone(x: Tensor) -> Tensor:
    """A dense ``x`` as a tensor over the same memory with a storage of its own."""
    if isinstance(x, FakeTensor):  # has no memory
        return x
    return torch.from_dlpack(x.as_strided((x.numel(),), (1,))).as_strided(x.shape, x.stride())


def _place(x: Tensor) -> int:
    """Where ``x`` is in memory. A fake tensor has no address, but its storage has a number."""
    if isinstance(x, FakeTensor):
        return x.untyped_storage()._cdata + x.storage_offset() * x.element_size()
    return x.data_ptr()
