"""Streams without a GPU: which stream an op is on, and what each stream has waited for.

Every op that PyTorch dispatches gets a time on the current stream. A stream that waits for another one
is after all that the other has done until then. So an op may read what another stream wrote only if
its own stream has waited for the write, and write only if it has waited for the reads, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeStream:
    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name = name
        self.waits = waits
        # For each stream, how many of its ops are before the next op of this one.
        self.seen: dict[str, int] = {}

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append((self.name, other.name))
        for name, time in other.seen.items():
            self.seen[name] = max(time, self.seen.get(name, 0))


class FakeCuda(TorchDispatchMode):
    """Stands for ``torch.cuda``, and watches ops while it is entered.

    Attributes:
        waits: (stream, what it waited for), in order.
        ops: the stream of each op.
        races: what was read or written without a wait.
        crossing: the storages that were made on one stream and used on another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.current = self.main = FakeStream("main", self.waits)
        self.made = 0
        self.ops: list[str] = []
        self.races: list[str] = []
        self.crossing: set[int] = set()
        self.written: dict[int, tuple[str, int]] = {}
        self.read: dict[int, dict[str, int]] = {}
        self.makers: dict[int, str] = {}
        # Kept, so that no other storage gets the same number.
        self.kept: list[Tensor] = []

    # What torch.cuda has.
    def Stream(self, device: object) -> FakeStream:  # noqa: N802
        self.made += 1
        return FakeStream(f"student {self.made - 1}", self.waits)

    def current_stream(self, device: object) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    # What is watched.
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        here = self.current
        now = here.seen[here.name] = here.seen.get(here.name, 0) + 1
        self.ops.append(here.name)
        named = zip(func._schema.arguments, args, strict=False)
        changed = {
            number(x)
            for argument, value in named
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors(value)
        }
        read, made = tensors((args, kwargs)), tensors(out)
        self.kept += [*read, *made]
        known = {number(x) for x in read}
        for storage in known:
            if here.name != self.makers.get(storage, here.name):
                self.crossing.add(storage)
            accesses = [self.written[storage]] if storage in self.written else []
            if storage in changed:
                accesses += self.read.get(storage, {}).items()
            for stream, time in accesses:
                if stream != here.name and here.seen.get(stream, 0) < time:
                    self.races.append(f"{func} on {here.name} against {stream}")
            self.read.setdefault(storage, {})[here.name] = now
        for storage in changed | {number(x) for x in made} - known:
            self.written[storage] = (here.name, now)
        for storage in {number(x) for x in made} - known:
            self.makers[storage] = here.name
        return out


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def number(x: Tensor) -> int:
    """The same for two tensors that share memory."""
    return x.untyped_storage()._cdata
