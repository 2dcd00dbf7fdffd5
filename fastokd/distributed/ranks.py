"""This process among several, and their communication beside the gradients.

W ranks lie on a mesh of D rows and M columns. The ranks of a column share the batch between them
(data parallel); the ranks of a row have the same images and share the students
(``--parallel students``). With M = 1 there is data parallelism alone.

It uses gloo on the CPU, so that no GPU waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastokd.errors import UserError
from fastokd.seeds import keyed_generator

T = TypeVar("T")
# Rank 0 may build the C++ ops, time engines or measure the finished run while the others wait for it.
PATIENCE = timedelta(minutes=60)

PARALLEL = ("data", "students")
_alone: list[bool] = []  # one for each :func:`alone` that this process is in


@dataclass(frozen=True)
class Line:
    """A row or a column of the mesh: this process's place on it, and its process group."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Line:
        return self  # a copied norm is on the same line


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; alone by default.

    ``data``: the column, whose ranks share a batch. ``students``: the row, whose ranks share the
    students. ``side``: all ranks, through gloo.
    """

    rank: int = 0
    size: int = 1
    data: Line = field(default_factory=Line)
    students: Line = field(default_factory=Line)
    side: Any = None

    @staticmethod
    def here(parallel: str, students: int, device: torch.device) -> Ranks:
        """This process on the mesh for ``students`` networks.

        Raises:
            UserError: students are to be shared by a number of ranks that doesn't allow it.
        """
        if parallel not in PARALLEL:
            raise UserError(f"parallel is {parallel!r}: choose {' or '.join(PARALLEL)}")
        if world_size() == 1:
            if parallel == "students":
                raise UserError(
                    "parallel is 'students', but there is one process: start several with "
                    "torchrun --nproc-per-node N -m fastokd train ..."
                )
            return Ranks()
        columns = student_columns(dist.get_world_size(), students) if parallel == "students" else 1
        return _mesh(dist.group.WORLD, columns, device.type)

    def note(self, batch: int, students: int) -> str:
        """How a batch and the students are shared, in one line; "" for a process alone."""
        if self.size == 1:
            return ""
        rows, columns = self.arrangement
        text = f"{self.size} ranks: {rows} x {batch // rows} images, batch {batch}"
        if columns > 1:
            shares = [len(Ranks(students=Line(c, columns)).share(students)) for c in range(columns)]
            text += f"; {students} students as {'+'.join(map(str, shares))}"
        return text

    @property
    def arrangement(self) -> tuple[int, int]:
        """Rows and columns of the mesh."""
        return self.data.size, self.students.size

    def share(self, students: int) -> range:
        """The students that this rank trains, of all of them; the first ranks have one more."""
        first, rest = divmod(students, self.students.size)
        r = self.students.rank
        start = r * first + min(r, rest)
        return range(start, start + first + (r < rest))

    def owner(self, student: int, students: int) -> int:
        """The rank of the first row that trains a student."""
        for column in range(self.students.size):
            line = Line(column, self.students.size)
            if student in Ranks(students=line).share(students):
                return column
        raise AssertionError(student)

    def first(self, act: Callable[[], T]) -> T:
        """Runs ``act`` on rank 0 and returns its result on every rank.

        Raises:
            UserError: on every rank, the one that it raised.
        """
        return first(act, self.side)

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.side)
        return box

    def collect(self, value: T) -> list[T] | None:
        """Every rank's ``value``, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        box: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self.side)
        return box

    def largest(self, value: Tensor) -> None:
        """An all-reduce (maximum) on the device, without a host sync."""
        dist.all_reduce(value, op=dist.ReduceOp.MAX)

    def wait(self) -> None:
        """A barrier."""
        if self.size > 1:
            dist.barrier(group=self.side)

    @contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """The first process of each machine runs the body before the others, to make files for them."""
        leads = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not leads:
            self.wait()
        yield
        if leads:
            self.wait()

    def summed(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums CPU tensors over the column in rank order; a rank may lack names.

        Every rank of a row counts the same images, so that rows aren't summed.
        """
        if self.data.size == 1:
            return totals
        everyone = self.gather((self.students.rank, totals))
        mine = [theirs for column, theirs in everyone if column == self.students.rank]
        names = dict.fromkeys(name for theirs in mine for name in theirs)
        return {
            name: torch.stack([theirs[name] for theirs in mine if name in theirs]).sum(0)
            for name in names
        }

    def seed_global(self, seed: int, step: int) -> None:
        """Seeds torch's global generator, for dropout, on all ranks but 0, each with its own stream."""
        if self.rank > 0:
            torch.manual_seed(keyed_generator(seed, "rank", self.rank, step).initial_seed())


def first(act: Callable[[], T], group: Any = None) -> T:
    """:meth:`Ranks.first` before there is a mesh."""
    if world_size() == 1:
        return act()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = act()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def speaks() -> bool:
    """Whether this process is the one that prints and writes."""
    return world_size() == 1 or dist.get_rank() == 0


def world_size() -> int:
    """Processes of this run; 1 within :func:`alone`."""
    joined = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if joined else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process shares nothing with the other ranks, which wait for it."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def student_columns(world: int, students: int) -> int:
    """The number of ranks that share the students: the largest that divides the ranks.

    Raises:
        UserError: no number from 2 to ``students`` divides ``world``.
    """
    columns = next(m for m in range(min(students, world), 0, -1) if world % m == 0)
    if columns == 1:
        raise UserError(
            f"parallel is 'students', but {world} ranks can't share {students} student(s): start a "
            f"multiple of {' or '.join(str(m) for m in range(2, students + 1))}"
            if students > 1
            else "parallel is 'students', but this recipe trains one network: leave --parallel out"
        )
    return columns


@lru_cache(maxsize=8)
def _mesh(world: Any, columns: int, device_type: str) -> Ranks:
    """The groups of one mesh, cached: creating them is a collective."""
    del world  # its identity tells one initialisation from the next
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh(
        device_type, (size // columns, columns), mesh_dim_names=("data", "students")
    )
    lines = [
        Line(mesh.get_local_rank(name), count, mesh.get_group(name))
        for name, count in (("data", size // columns), ("students", columns))
    ]
    return Ranks(rank, size, lines[0], lines[1], dist.new_group(backend="gloo", timeout=PATIENCE))
