"""A classifier of another library as a student.

State keys are the library's, prefixed with ``net.`` (``Student.published_key`` drops it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import UserError, unknown_name
from fastokd.models.layers import DropPath, Tap
from fastokd.models.probe import Probe, pool_features, probe
from fastokd.models.recompute import Recomputed, blocks_of
from fastokd.models.split import Split, enclosing, prune, split
from fastokd.models.student import Student, StudentOutput

FEATURES = ""  # no submodule has this path


def use_drop_paths(net: nn.Module) -> None:
    """Replaces stochastic depth of torchvision and timm by :class:`DropPath`, whose masks an engine can
    give. Neither has state."""
    for parent in list(net.modules()):
        for name, module in parent.named_children():
            kind, home = type(module).__name__, type(module).__module__.partition(".")[0]
            own: dict[str, Any] = vars(module)
            if (home, kind) == ("torchvision", "StochasticDepth"):
                path = DropPath(own["p"], by_row=own["mode"] == "row")
            elif (home, kind) == ("timm", "DropPath"):
                path = DropPath(own["drop_prob"], scaled=own["scale_by_keep"])
            else:
                continue
            if path.p:
                setattr(parent, name, path)


class ExternalStudent(Student):
    """Another library's classifier with the interface of a :class:`Student`.

    Features are the input of its last layer (before a dropout; averaged over positions), maps the
    outputs of the last block at each of its four smallest resolutions. Both are found by one forward
    on the meta device and read by forward hooks.

    Args:
        net: ``[B, 3, H, W] -> [B, C]``. Its modules' in-place flags are cleared.
        name: for messages.
        num_classes: C.
        input_size: height and width of the images of that forward, which finds the maps.
        split_at: the module that ends the trunk of a branch cohort, in the network's own dotted
            names; None: network sharing only.
        found: the :class:`Probe` of an earlier student of the same form, if there was one.

    Raises:
        UserError: no features can be found, or the network can't be split there.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        num_classes: int,
        input_size: int,
        split_at: str | None = None,
        found: Probe | None = None,
    ) -> None:
        super().__init__()
        for module in net.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        use_drop_paths(net)
        self.net = net
        self.name = name
        hidden: frozenset[str] = enclosing(split_at) if split_at else frozenset()
        known = found is not None
        found = found or probe(net, name, num_classes, input_size, hidden)
        self.found = found
        self.feature_dim = found.feature_dim
        self.map_names = found.maps_at
        self.map_stages = ()
        self.stages = (("net",),) if split_at is None else (("net",), ("net",))
        self._channels_first = found.channels_first
        self._taken: dict[str, Tensor] = {}
        features_at = net.get_submodule(found.features_at)
        features_at.register_forward_hook(Tap(self._taken, FEATURES, of_input=True))
        for path in found.maps_at:
            net.get_submodule(path).register_forward_hook(Tap(self._taken, path))
        self._cuts: dict[bool, Split] = {}
        if split_at is not None:
            self._cuts = self._cut(split_at)
            if not known:
                self._check_cut(split_at, input_size)

    def whole(self, x_BCHW: Tensor) -> Tensor:
        """The unsplit network. Students share images, so one that writes to them gets a copy."""
        logits_BC: Tensor = self.net(x_BCHW.clone() if self.found.writes_input else x_BCHW)
        return logits_BC

    @property
    def branch_from(self) -> int:  # type: ignore[override]
        """1 where ``split_at`` was given.

        Raises:
            UserError: it wasn't; the message names modules at which this network can be split.
        """
        if len(self.stages) == 1:
            near = [path for path in self._candidates() if self._can_cut(path)]
            hint = f" ({' or '.join(near)}, as in --set split_at={near[0]})" if near else ""
            raise UserError(
                f"{self.name} has no stated split into trunk and branch: give the option split_at "
                f"with the name of one of its modules{hint}, or use sharing='network'"
            )
        return 1

    def stage(self, index: int, x_BCHW: Tensor) -> Tensor:
        """Runs the whole, or one of its two halves; the last one gives logits."""
        if not self._cuts:
            return self.whole(x_BCHW)
        return self._cuts[self.training].halves[index](self, x_BCHW)

    def _run(self, x_BCHW: Tensor, start: int, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._taken.clear()
        for index in range(start, stop):
            x_BCHW = self.stage(index, x_BCHW)
        maps = tuple(self._taken.pop(path) for path in self.map_names if path in self._taken)
        return x_BCHW, maps

    def outputs(self, x_BCHW: Tensor, start: int = 0) -> StudentOutput:
        """Runs the halves from ``start`` on."""
        logits_BC, maps = self._run(x_BCHW, start, len(self.stages))
        features_BD = pool_features(self._taken.pop(FEATURES), self._channels_first)
        return StudentOutput(logits_BC, features_BD, maps)

    def recompute_activations(self) -> None:
        """From now on each of the network's blocks keeps its input alone.

        Raises:
            UserError: it has no blocks: no modules in a list or sequence that consist of others.
        """
        blocks = blocks_of(self.net, self.found.features_at)
        if not blocks:
            raise UserError(
                f"{self.name} has no blocks whose activations could be recomputed: leave "
                "--checkpoint-activations out"
            )
        self.recomputes = True
        for block in blocks:
            block.forward = Recomputed(block)

    def keep_stages(self, start: int, stop: int | None) -> None:
        """Drops what the other half uses; the rest keeps its names."""
        if len(self.stages) == 2 and (start, stop) != (0, None):
            prune(self, self._cuts[True], keep_first=stop == 1)

    @property
    def stage_count(self) -> int:
        """The number of maps: each ends a stage, the first one with the stem."""
        return len(self.map_names)

    def body(self, stages: int) -> list[str]:
        cut = self.found.stages if stages < 0 else self.found.stages[:stages]
        return self._present(f"net.{path}" for paths in cut for path in paths)

    def body_parameters(self, stages: int) -> list[nn.Parameter]:
        if stages >= 0:
            return super().body_parameters(stages)
        head = set(
            self.head_parameters()
        )  # a token or a position belongs to no module that is called
        return [p for p in self.parameters() if p not in head]

    def head_parameters(self) -> list[nn.Parameter]:
        names = self._present([f"net.{self.found.classifier}"])
        return [p for name in names for p in self.get_submodule(name).parameters()]

    def published_key(self, key: str) -> str:
        return key.removeprefix("net.")

    def _cut(self, split_at: str) -> dict[bool, Split]:
        """The split in training and in eval mode: the code between the modules may differ."""
        paths = [path for path, _ in self.net.named_modules() if path]
        if split_at not in paths:
            raise unknown_name(f"module of {self.name}", split_at, paths)
        mode = self.training
        cuts = {}
        for training in (True, False):
            self.train(training)
            cuts[training] = split(self, f"net.{split_at}", self.name)
        self.train(mode)
        if cuts[True].first != cuts[False].first:
            raise UserError(
                f"{self.name} can't be split at {split_at!r}: it runs other modules in training "
                "than in evaluation; choose another module, or sharing='network'"
            )
        return cuts

    def _candidates(self) -> tuple[str, ...]:
        """Modules to suggest for a split: those of maps, or the last but one in the longest row of blocks."""
        if self.map_names:
            return self.map_names[:-1]
        rows = {
            path: list(module.named_children())
            for path, module in self.net.named_modules()
            if path and isinstance(module, (nn.Sequential, nn.ModuleList))
        }
        row = max(rows, key=lambda path: len(rows[path]), default="")
        return (f"{row}.{rows[row][-2][0]}",) if row and len(rows[row]) > 1 else ()

    def _can_cut(self, path: str) -> bool:
        try:
            self._cut(path)
        except UserError:
            return False
        return True

    def _check_cut(self, split_at: str, size: int) -> None:
        """Runs both halves on the meta device: they must be joined by one tensor, which the second mustn't
        change, since every branch reads it."""
        mode = self.training
        self.eval()
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        meta = {f"student.{key}": value.to("meta") for key, value in state.items()}
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(2, 3, size, size)
            fault: str = torch.func.functional_call(_CutFault(self), meta, (images,))
        self.train(mode)
        if fault:
            raise UserError(
                f"{self.name} can't be split at {split_at!r}: {fault}; choose another module, or "
                "sharing='network'"
            )


class _CutFault(nn.Module):
    """What is wrong with the tensor at the split, or an empty string."""

    def __init__(self, student: ExternalStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, x_BCHW: Tensor) -> str:
        trunk, _ = self.student.trunk(x_BCHW, 1)
        if not isinstance(trunk, Tensor):
            return f"it gives a {type(trunk).__name__} where one tensor is needed"
        before = trunk._version
        self.student.outputs(trunk, 1)
        return "" if trunk._version == before else "what follows changes its output in place"
