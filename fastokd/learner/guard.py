"""A step with a value that isn't finite is skipped by a device-side flag, without a host sync.

The step writes its answer into a flag that stays where the step runs. Fused optimizers read it there
(``found_inf``), and what else a step writes in place is put back by it. Once up it stays up, so that
the steps which were queued before somebody reads it are not taken either: when it is read, all state
is the one from before the first bad step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Steps between two reads: what a fault costs at most, beside one wait for the device a hundred steps.
READ_EVERY = 100

# What the CUDA kernel of `_amp_foreach_non_finite_check_and_unscale_` takes; the CPU's takes bf16 too.
CHECKED = (torch.float16, torch.float32, torch.float64)

RandomState = tuple[Tensor, Tensor | None]


class Fault(NamedTuple):
    """How many of the last steps weren't taken, and the random states around the first of them."""

    untaken: int
    random_before: RandomState
    random_after: RandomState


class Guard:
    """The flag, how many steps were taken since it was last read, and the random states before them.

    Attributes:
        fault: 0-d float32 on the device, 1 from the first step on that isn't finite.
        share: called with ``fault`` before each update. Where several ranks train together it must
            give all of them the largest (an all-reduce), so that all take the step or none does.
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
        """Raises the flag where one of ``values`` isn't finite; they stay as they are."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for value in values:
            if value is not None:
                # Gradients are many, and need no detaching.
                plain = value.detach() if value.requires_grad else value
                plain = plain if plain.dtype in CHECKED else plain.float()
                by_dtype.setdefault(plain.dtype, []).append(plain)
        for group in by_dtype.values():
            # What GradScaler asks of gradients, with a scale of one: a single pass over all.
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.fault, self._one)

    def agree(self) -> None:
        """All ranks take the step, or none."""
        if self.share is not None:
            self.share(self.fault)

    def counted(self) -> None:
        """The step is over: it counts as taken where the flag is down."""
        self._taken.add_(1 - self.fault)

    def begin(self) -> None:
        """A step begins: notes its random states, on the host, where they are kept."""
        self._steps += 1
        self._random.append(random_state(self.device))

    def read(self) -> Fault | None:
        """What happened since the last reading: None where every step was taken.

        The one place where the device is waited for. The flag stays up until :meth:`forget`.
        """
        if not self.fault.item():
            self.forget()
            return None
        untaken = self._steps - int(self._taken.item())
        now = random_state(self.device)
        after = self._random[1 - untaken] if untaken > 1 else now
        return Fault(untaken, self._random[-untaken], after)

    def forget(self) -> None:
        """Takes the flag down and counts from here."""
        self.fault.zero_()
        self._taken.zero_()
        self._random.clear()
        self._steps = 0


class Held:
    """Tensors that a step writes in place, and what they were before it.

    They are small (running statistics, an average of one student) and many: copied as one flat
    tensor a dtype.
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
        """Notes what they are."""
        self._before = [torch.cat(group) for group in self.groups]
        self._now = None

    @torch.no_grad()
    def look(self) -> list[Tensor]:
        """What they are now; they must stay so until :meth:`put_back`."""
        self._now = [torch.cat(group) for group in self.groups]
        return self._now

    @torch.no_grad()
    def put_back(self, undo: Tensor) -> None:
        """Makes them what they were where the 0-d ``undo`` isn't 0, else leaves their bits alone."""
        now = self._now or self.look()
        pairs = zip(self._before, now, strict=True)
        self._write([torch.where(undo != 0, before, after) for before, after in pairs])

    def _write(self, values: list[Tensor]) -> None:
        for group, flat in zip(self.groups, values, strict=True):
            torch._foreach_copy_(group, list(flat.split([len(one) for one in group])))


class Shared(Held):
    """Running statistics that the parts of a batch move: each part finds those from before the step,
    and what it makes of them counts by its share."""

    @torch.no_grad()
    def take(self) -> None:
        super().take()
        self._sums = [torch.zeros_like(before) for before in self._before]

    @torch.no_grad()
    def part(self, share: float) -> None:
        """A part is over, its backward too."""
        torch._foreach_add_(self._sums, self.look(), alpha=share)
        self._write(self._before)

    @torch.no_grad()
    def end(self) -> None:
        """All parts are over."""
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
    """The same memory in one dimension, in the order in which it lies."""
    tensor = tensor.detach()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor.view(-1)
    if span != tensor.numel():
        raise ValueError(f"a tensor {list(tensor.shape)} with gaps in its memory can't be held")
    return tensor.as_strided((span,), (1,))
