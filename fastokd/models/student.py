"""What a student is: a chain of stages and a head, that can be cut into trunk and branch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastokd.models.layers import GlobalAveragePool


class StudentOutput(NamedTuple):
    """What a cohort reads from one student."""

    logits_BC: Tensor
    features_BD: Tensor
    maps: tuple[Tensor, ...]


class Student(nn.Module):
    """A classifier as a chain of stages (the stem first) and a head.

    A subclass creates its children under their published names, then calls :meth:`chain` with the
    names of each stage's children in running order. Every stage but the stem ends in a *map*
    (FFSD's stage maps). ``forward`` gives plain logits; :meth:`outputs` gives all that a cohort
    reads.

    Attributes:
        feature_dim: width of the pooled feature that enters the classifier.
        stages: for each stage, the names of its children in running order.
        branch_from: the first stage that is not shared in a *branch* cohort.
    """

    feature_dim: int
    stages: tuple[tuple[str, ...], ...]
    branch_from: int

    def chain(
        self, *stages: tuple[str, ...], head: str, feature_dim: int, branch_from: int = -1
    ) -> None:
        """Declares the stages, the child that classifies, and where a branch begins."""
        self.stages = stages
        self.head_name = head
        self.feature_dim = feature_dim
        self.branch_from = branch_from % len(stages)
        self.pool = GlobalAveragePool()

    def stage(self, index: int, x_BCHW: Tensor) -> Tensor:
        """Runs stage ``index`` (0 is the stem)."""
        for name in self.stages[index]:
            x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW

    def trunk(self, x_BCHW: Tensor, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs the stages before ``stop``: their output and their maps."""
        maps = []
        for index in range(stop):
            x_BCHW = self.stage(index, x_BCHW)
            if index:
                maps.append(x_BCHW)
        return x_BCHW, tuple(maps)

    def outputs(self, x_BCHW: Tensor, start: int = 0) -> StudentOutput:
        """Runs the stages from ``start`` on and the head."""
        maps = []
        for index in range(start, len(self.stages)):
            x_BCHW = self.stage(index, x_BCHW)
            if index:
                maps.append(x_BCHW)
        features_BD = self.pool(x_BCHW)
        return StudentOutput(getattr(self, self.head_name)(features_BD), features_BD, tuple(maps))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``[B, 3, H, W]`` normalised images to ``[B, C]`` logits."""
        return self.outputs(x_BCHW).logits_BC

    def keep_stages(self, start: int, stop: int | None) -> None:
        """Drops the children of every stage outside ``[start, stop)``; the head too where
        ``stop`` is given. What is left keeps its names."""
        last = len(self.stages) if stop is None else stop
        for index, names in enumerate(self.stages):
            if not start <= index < last:
                for name in names:
                    delattr(self, name)
        if stop is not None:
            delattr(self, self.head_name)
