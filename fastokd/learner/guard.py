"""A step with a value that isn't finite is skipped by a device-side flag, without a host sync.

The flag is a device tensor. Fused optimizers read it (``found_inf``); everything else that a step
writes in place is restored where it is set. It stays set until the host reads it, so the steps queued
after a bad one are skipped too: at the read, all state is that of before the first bad step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Steps between two reads of the flag: each read waits for the device, and a fault loses at most as many.
READ_EVERY = 100

# What the CUDA kernel of `_amp_foreach_non_finite_check_and_unscale_` takes; the CPU's takes bf16 too.
CHECKED = (torch.float16, torch.float32, torch.float64)

RandomState = tuple[Tensor, Tensor | None]


class Fault(NamedTuple):
    """The number of steps skipped at the end, and the random states around the first of them."""

    untaken: int
    random_before: RandomState
    random_after: RandomState


class Guard:
    """The flag, the number of steps taken since the last read, and their random states.

    Attributes:
        fault: 0-d float32 on the device, 1 from the first step on that isn't finite.
        share: an all-reduce (maximum) of ``fault`` before each update, so that all ranks take the step
            or none does; None on one rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fault = torch.zeros((), device=device)
        self.share: Callable[[Tensor], object] | None = None
        self._taken = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._steps = 0
        self._random: deque[RandomState] = deque(maxlen=READ_EVERY)

    @torch.no_grad()
    def check(self, values: Iterable[Tensor | None]) -> None:
        """Sets the flag where one of ``values`` isn't finite; the values don't change."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for value in values:
            if value is not None:
                # A gradient needs no detach, and there are many.
                plain = value.detach() if value.requires_grad else value
                plain = plain if plain.dtype in CHECKED else plain.float()
                by_dtype.setdefault(plain.dtype, []).append(plain)
        for group in by_dtype.values():
            # GradScaler's own check, with a scale of 1: one pass over all tensors.
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.fault, self._one)

    def agree(self) -> None:
        """All ranks take the step, or none."""
        if self.share is not None:
            self.share(self.fault)

    def counted(self) -> None:
        """Counts the step as taken where the flag isn't set."""
        self._taken.add_(1 - self.fault)

    def begin(self) -> None:
        """A step begins: stores its random states on the host."""
        self._steps += 1
        self._random.append(random_state(self.device))

    def withdraw(self) -> RandomState:
        """The last step to begin computed nothing: forgets it; returns its random states."""
        self._steps -= 1
        return self._random.pop()

    def read(self) -> Fault | None:
        """The fault since the last read, or None where every step was taken.

        This waits for the device. The flag stays set until :meth:`forget`.
        """
        if not self.fault.item():
            self.forget()
            return None
        untaken = self._steps - int(self._taken.item())
        now = random_state(self.device)
        after = self._random[1 - untaken] if untaken > 1 else now
        return Fault(untaken, self._random[-untaken], after)

    def forget(self) -> None:
        """Clears the flag and the count."""
        self.fault.zero_()
        self._taken.zero_()
        self._random.clear()
        self._steps = 0


class Held:
    """Tensors that a step writes in place, and copies from before it.

    They are small and many (running statistics, an average of one student), so they are copied as one
    flat tensor a dtype.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(_flat(tensor))
        self.groups = list(by_dtype.values())
        self._before: list[Tensor] = []
        self._now: list[Tensor] | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present values."""
        self._before = [torch.cat(group) for group in self.groups]
        self._now = None

    @torch.no_grad()
    def look(self) -> list[Tensor]:
        """The present values, flat; they must not change until :meth:`put_back`."""
        self._now = [torch.cat(group) for group in self.groups]
        return self._now

    @torch.no_grad()
    def put_back(self, undo: Tensor) -> None:
        """Restores the copies where the 0-d ``undo`` isn't 0; else no bit changes."""
        now = self._now or self.look()
        pairs = zip(self._before, now, strict=True)
        self._write([torch.where(undo != 0, before, after) for before, after in pairs])

    def _write(self, values: list[Tensor]) -> None:
        for group, flat in zip(self.groups, values, strict=True):
            torch._foreach_copy_(group, list(flat.split([len(one) for one in group])))


class Shared(Held):
    """Running statistics of an accumulated batch: each part starts from those before the step, and the
    results are averaged by the parts' shares."""

    @torch.no_grad()
    def take(self) -> None:
        super().take()
        self._sums = [torch.zeros_like(before) for before in self._before]

    @torch.no_grad()
    def part(self, share: float) -> None:
        """After a part's backward."""
        torch._foreach_add_(self._sums, self.look(), alpha=share)
        self._write(self._before)

    @torch.no_grad()
    def end(self) -> None:
        """After the last part: writes the averages."""
        self._write(self._sums)


def random_state(device: torch.device) -> RandomState:
    """The random states that a step draws from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def set_random_state(state: RandomState, device: torch.device) -> None:
    """The reverse of :func:`random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view in memory order."""
    tensor = tensor.detach()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor.view(-1)
    if span != tensor.numel():
        raise ValueError(f"a tensor {list(tensor.shape)} with gaps in its memory can't be restored")
    return tensor.as_strided((span,), (1,))
