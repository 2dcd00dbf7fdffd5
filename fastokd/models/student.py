"""The base class of students: a chain of stages and a head, which splits into trunk and branch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models.layers import GlobalAveragePool
from fastokd.models.recompute import recomputed


class StudentOutput(NamedTuple):
    """The outputs of one student."""

    logits_BC: Tensor
    features_BD: Tensor
    maps: tuple[Tensor, ...]


def with_versions(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state`` with the module versions that other libraries read in ``load_state_dict``. Files of
    tensors lack them."""
    if hasattr(state, "_metadata"):
        return state
    versioned = OrderedDict(state)
    versioned._metadata = {  # type: ignore[attr-defined]
        path: {"version": part._version}
        for path, part in module.named_modules()
        if "_version" in vars(type(part)) and not type(part).__module__.startswith("torch.")
    }
    return versioned


class Student(nn.Module):
    """A classifier as a chain of stages (the stem first) and a head.

    A subclass creates its children under their published names, then calls :meth:`chain` with the
    names of each stage's children in running order (dotted where a child is nested). A stage that
    is listed in ``map_stages`` ends in a *map* (FFSD's stage maps); the others are the stem, and
    the pooling or transition between two maps. ``forward`` returns logits; :meth:`outputs` returns
    all that a cohort reads.

    Attributes:
        feature_dim: width of the pooled feature that enters the classifier.
        stages: for each stage, the names of its children in running order.
        map_stages: the stages that end in a map.
        branch_from: the first stage that is not shared in a *branch* cohort.
        recomputes: in training, each stage's activations are recomputed in the backward.
        frozen: the number of first stages that aren't trained; -1 for all. :meth:`freeze` sets it.
    """

    recomputes = False
    frozen = 0

    feature_dim: int
    stages: tuple[tuple[str, ...], ...]
    map_stages: tuple[int, ...]
    branch_from: int

    def chain(
        self,
        *stages: tuple[str, ...],
        head: str,
        feature_dim: int,
        branch_from: int = -1,
        map_stages: tuple[int, ...] | None = None,
    ) -> None:
        """Declares the stages, the child that classifies, and where a branch begins.

        ``map_stages`` defaults to every stage but the stem.

        Raises:
            UserError: ``branch_from`` is no stage after the first.
        """
        self.stages = stages
        self.map_stages = tuple(range(1, len(stages))) if map_stages is None else map_stages
        self.head_name = head
        self.feature_dim = feature_dim
        last = len(stages) - 1
        if not isinstance(branch_from, int) or not 0 < abs(branch_from) <= max(last, 1):
            raise UserError(
                f"branch_from is {branch_from!r}: it must be a stage after the stem, from 1 to {last}"
            )
        self.branch_from = branch_from % len(stages)
        self.pool = GlobalAveragePool()

    def stage(self, index: int, x_BCHW: Tensor) -> Tensor:
        """Runs stage ``index`` (0 is the stem)."""
        for name in self.stages[index]:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        return x_BCHW

    def _run(self, x_BCHW: Tensor, start: int, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = []
        for index in range(start, stop):
            x_BCHW = (
                self._recomputed(index, x_BCHW) if self.recomputes else self.stage(index, x_BCHW)
            )
            if index in self.map_stages:
                maps.append(x_BCHW)
        return x_BCHW, tuple(maps)

    def _recomputed(self, index: int, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return self.stage(index, x_BCHW)
        parts = [self.get_submodule(name) for name in self.stages[index]]
        modules = [module for part in parts for module in part.modules()]
        x_BCHW = recomputed(lambda x_BCHW: self.stage(index, x_BCHW), modules, x_BCHW)
        return x_BCHW

    def recompute_activations(self) -> None:
        """From now on each stage keeps its input alone (``recompute.py``)."""
        self.recomputes = True

    def trunk(self, x_BCHW: Tensor, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs the stages before ``stop``: their output and their maps."""
        return self._run(x_BCHW, 0, stop)

    def outputs(self, x_BCHW: Tensor, start: int = 0) -> StudentOutput:
        """Runs the stages from ``start`` on and the head."""
        x_BCHW, maps = self._run(x_BCHW, start, len(self.stages))
        features_BD = self.pool(x_BCHW)
        return StudentOutput(getattr(self, self.head_name)(features_BD), features_BD, maps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``[B, 3, H, W]`` normalised images to ``[B, C]`` logits."""
        return self.outputs(x_BCHW).logits_BC

    def keep_stages(self, start: int, stop: int | None) -> None:
        """Drops the children of every stage outside ``[start, stop)``, and the head where ``stop`` is
        given. The rest keeps its names."""
        last = len(self.stages) if stop is None else stop
        for index, names in enumerate(self.stages):
            if not start <= index < last:
                for name in names:
                    parent, _, child = name.rpartition(".")
                    delattr(self.get_submodule(parent), child)
        if stop is not None:
            delattr(self, self.head_name)

    @property
    def stage_count(self) -> int:
        """The number of stages that :meth:`freeze` knows."""
        return len(self.stages)

    def body(self, stages: int) -> list[str]:
        """The modules of the first ``stages`` stages (-1: of all) that this student or trunk has."""
        last = len(self.stages) if stages < 0 else stages
        return self._present(name for names in self.stages[:last] for name in names)

    def _present(self, names: Iterable[str]) -> list[str]:
        there = {name for name, _ in self.named_modules()}
        return [name for name in names if name in there]

    def body_parameters(self, stages: int) -> list[nn.Parameter]:
        """The parameters of the first ``stages`` stages; -1: of all but the head."""
        return [p for name in self.body(stages) for p in self.get_submodule(name).parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the layer that classifies; none of a trunk."""
        names = self._present([self.head_name])
        return [p for name in names for p in self.get_submodule(name).parameters()]

    def freeze(self, stages: int) -> None:
        """Keeps the first ``stages`` stages in eval mode from now on; 0: none, -1: all."""
        self.frozen = stages
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        if mode and self.frozen:
            for name in self.body(self.frozen):
                self.get_submodule(name).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        return super().load_state_dict(with_versions(self, state_dict), strict, assign)

    def published_key(self, key: str) -> str:
        """A state entry's key in the checkpoints of the network's authors.

        The students of this package have the published keys, so this is the identity; another
        library's drops its prefix.
        """
        return key
