"""S students as one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort.companion import Companion
from fastokd.cohort.grouped import GroupedStudents
from fastokd.cohort.layers import use_ops
from fastokd.cohort.loop import LoopStudents
from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.cohort.shadows import narrowed, sites_of
from fastokd.cohort.sharing import check_sharing
from fastokd.cohort.stacks import Stack
from fastokd.cohort.streams import Streams
from fastokd.cohort.views import ScaleGradient, check_trunk_views, count_views, for_each, run_trunk
from fastokd.cohort.vmapped import VmapStudents
from fastokd.errors import UserError
from fastokd.models import (
    Student,
    StudentOutput,
    create_model,
    input_size,
    map_shapes,
    trunk_shape,
)
from fastokd.models.student import with_versions
from fastokd.ops.normalize import normalize, scale_and_shift

ENGINES = ("loop", "grouped", "vmap")


class Cohort(nn.Module):
    """Several students trained together; the last is the leader where the method has one.

    In a *branch* cohort the students share every stage before ``Student.branch_from``: the trunk.
    In a *network* cohort they share only the images. State is kept per student with every engine:
    ``trunk.<key>`` and ``students.<s>.<key>``, where ``<key>`` is the student's own.

    Args:
        students: a model name and a count, ``("resnet32", 4)``, or a list of names (a mixed
            cohort, network sharing only). The count is of every network, leader included.
        num_classes: C, at least 2.
        sharing: ``"branch"`` or ``"network"``.
        engine: how the students run: ``"loop"``, ``"grouped"``, ``"vmap"`` or ``"auto"``. All give
            the same numbers.
        impl: of the students' layers: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``, as
            :func:`~fastokd.cohort.layers.use_ops` takes it.
        mean, std: of the images, for each channel, in units of [0, 1].
        seed: initial weights are a function of it and the student's index alone.
        teacher: a frozen classifier ``[B, 3, H, W] -> [B, C]``, run in eval mode without gradient
            on the same images. It isn't part of the cohort's state.
        trunk_grad_scale: multiplies the gradient that the students send into the trunk.
        model_options: arguments of every student's constructor.
        image_size: height and width of the images, from which ``shape.map_shapes`` follow; None for
            the size that the first student was published for.
        trunk_views: where each student has a view of its own, the trunk runs over ``"each"`` by itself,
            or over ``"all"`` as one batch (``views.py``).

    Raises:
        UserError: no students, an unknown model, a mixed branch cohort, an unknown engine.
    """

    scale_C: Tensor
    shift_C: Tensor

    def __init__(
        self,
        students: tuple[str, int] | Sequence[str],
        num_classes: int,
        *,
        sharing: str = "branch",
        engine: str = "auto",
        impl: str = "auto",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        seed: int = 0,
        teacher: nn.Module | None = None,
        trunk_grad_scale: float = 1.0,
        model_options: dict[str, Any] | None = None,
        image_size: int | None = None,
        trunk_views: str = "each",
    ) -> None:
        super().__init__()
        self.model_names = _names(students)
        check_trunk_views(trunk_views)
        self.trunk_views = trunk_views
        check_sharing(sharing, self.model_names)
        self.num_classes = num_classes
        self.sharing = sharing
        self.impl = impl
        self.trunk_grad_scale = trunk_grad_scale
        self.model_options = options = dict(model_options or {})
        self.image_size = image_size or input_size(self.model_names[0], options)
        # In a list, so that its parameters and buffers aren't the cohort's.
        self._teacher = None if teacher is None else [teacher.eval().requires_grad_(False)]
        self._companion: list[Companion] = []  # in a list for the same reason
        scale_C, shift_C = scale_and_shift(mean, std)
        self.register_buffer("scale_C", scale_C, persistent=False)
        self.register_buffer("shift_C", shift_C, persistent=False)

        built = [self._new_student(index, seed) for index in range(len(self.model_names))]
        self.branch_from = built[0].branch_from if sharing == "branch" else 0
        maps = {
            name: map_shapes(name, num_classes, options, image_size or input_size(name, options))
            for name in dict.fromkeys(self.model_names)
        }
        self._map_shapes = tuple(maps[name] for name in self.model_names)
        self.trunk: Student | None = None
        # What all students read, without the batch.
        self._read_shape: tuple[int, ...] = (3, self.image_size, self.image_size)
        if sharing == "branch":
            name, size = self.model_names[0], self.image_size
            self._read_shape = trunk_shape(name, num_classes, size, **options)
            self.trunk = self._new_student(0, seed)
            self.trunk.keep_stages(0, self.branch_from)
            for student in built:
                student.keep_stages(self.branch_from, None)
        self.students = nn.ModuleList(built)
        for student in (*built, *([] if self.trunk is None else [self.trunk])):
            use_ops(student, impl)
        self.memory_format = torch.channels_last
        self.own = range(len(built))
        self.streams: Streams | None = None
        self._exchange: Callable[[list[StudentOutput]], list[StudentOutput]] | None = None
        self.set_engine(engine)

    def train_only(
        self, own: range, exchange: Callable[[list[StudentOutput]], list[StudentOutput]]
    ) -> None:
        """From now on runs and trains only the students ``own``; the others' state is kept.

        ``exchange`` takes their outputs and returns those of all students.
        """
        self.own, self._exchange = own, exchange
        for index, student in enumerate(self.students):
            student.requires_grad_(index in own)
        self.set_engine(self.engine, self.streams is not None)

    def parts(self) -> list[Student]:
        """The trunk, if there is one, and every student."""
        return [*([] if self.trunk is None else [self.trunk]), *self._members()]

    def freeze(self, stages: int) -> None:
        """Trains all but the first ``stages`` stages of each student: a frozen one has no gradient, and
        is in eval mode. 0: all are trained; -1: the heads only. The engine must be set again.

        Raises:
            UserError: a student has fewer stages.
        """
        for name, student in zip(self.model_names, self._members(), strict=True):
            if stages > student.stage_count:
                raise UserError(
                    f"frozen_stages is {stages}, but {name} has {student.stage_count} stages: choose at "
                    "most as many, or -1 for all"
                )
        own = [self.students[index] for index in self.own]
        for companion in self._companion:
            for part in companion.networks.parts():
                part.freeze(stages)
        for part in self.parts():
            if part is self.trunk or part in own:  # other ranks train the others
                for parameter in part.body_parameters(part.frozen):
                    parameter.requires_grad_(True)
            part.freeze(stages)
            for parameter in part.body_parameters(stages):
                parameter.requires_grad_(False)

    def set_engine(self, engine: str, streams: bool = False) -> None:
        """Changes the engine; the students' state doesn't change.

        ``streams``: on a GPU the loop's students, and what a method computes for each, run side by
        side (``streams.py``); meant for a captured step.

        Raises:
            UserError: an unknown engine, or one that can't run these students or has no streams, with
                the reason.
        """
        members = list(self._members())[self.own.start : self.own.stop]
        if streams and engine in ("grouped", "vmap"):
            raise UserError(
                f"engine={engine!r} runs all students in one launch and has no streams: use "
                "engine='loop', or leave streams out"
            )
        if self.recomputes and (streams or engine == "vmap"):
            what = "streams" if streams else f"engine={engine!r}"
            raise UserError(
                f"{what} can't recompute activations: use loop or grouped without streams, or leave "
                "--checkpoint-activations out"
            )
        beside = Streams(len(members)) if streams else None
        stacks: list[Stack] = []
        if engine in ("auto", "loop"):
            run: Callable[[list[Tensor]], list[StudentOutput]] = LoopStudents(
                members, self.branch_from, beside
            )
        elif engine == "grouped":
            run = grouped = GroupedStudents(members, self.branch_from)
            stacks = grouped.stacks
        elif engine == "vmap":
            example = torch.empty(2, *self._read_shape, device="meta")
            run = vmapped = VmapStudents(members, self.branch_from, example)
            stacks = vmapped.stacks
        else:
            raise UserError(f"engine is {engine!r}: choose auto, {', '.join(ENGINES)}")
        self._trunk_sites = [] if self.trunk is None else sites_of(self.trunk)
        self._run, self.engine = run, "loop" if engine == "auto" else engine
        self.streams, self._stacks = beside, stacks
        self.join()
        for companion in self._companion:
            companion.networks.set_engine(engine)

    def join(self) -> None:
        """Moves what the engine stacks into one memory (``stacks.py``); the values don't change."""
        for stack in self._stacks:
            stack.join()

    def recompute_activations(self) -> None:
        """From the next :meth:`set_engine` on, students keep each stage's input alone, and the backward
        computes the rest again: gradients to the bit, less memory, a second forward.

        Raises:
            UserError: a student of another library has no blocks to recompute.
        """
        for student in (*self._members(), *([] if self.trunk is None else [self.trunk])):
            student.recompute_activations()

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed."""
        return any(student.recomputes for student in self._members())

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Sets the memory format of weights and maps."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)
        for companion in self._companion:
            companion.networks.set_memory_format(memory_format)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the statistics that images are normalised by, in place."""
        for ours, value_C in zip(
            (self.scale_C, self.shift_C), scale_and_shift(mean, std), strict=True
        ):
            ours.copy_(value_C)
        for companion in self._companion:
            companion.networks.set_statistics(mean, std)

    def like(self, students: int) -> Cohort:
        """A cohort of this one's first ``students``, with initial weights of its own; a single one is a
        whole network."""
        whole = students == len(self.students)
        made = Cohort(
            self.model_names[:students],
            self.num_classes,
            sharing=self.sharing if whole else "network",
            engine=self.engine,
            impl=self.impl,
            model_options=self.model_options,
            image_size=self.image_size,
            trunk_views=self.trunk_views,
        )
        for ours, theirs in ((made.scale_C, self.scale_C), (made.shift_C, self.shift_C)):
            ours.copy_(theirs)
        made.to(self.scale_C.device, self.scale_C.dtype).set_memory_format(self.memory_format)
        return made

    def accompany(self, companion: Companion | None) -> None:
        """From now on ``companion`` runs beside the students in training in place of another one; None: none
        does."""
        self._companion = [] if companion is None else [companion]

    @property
    def companion(self) -> Companion | None:
        return self._companion[0] if self._companion else None

    def _new_student(self, index: int, seed: int) -> Student:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + index)
            return create_model(self.model_names[index], self.num_classes, **self.model_options)

    @property
    def shape(self) -> CohortShape:
        """What a method is built from."""
        return CohortShape(
            len(self.students),
            self.num_classes,
            self.sharing,
            tuple(student.feature_dim for student in self._members()),
            self._read_shape[0] if self.sharing == "branch" else None,
            self._map_shapes,
            self,
        )

    def _members(self) -> Iterator[Student]:
        for student in self.students:
            assert isinstance(student, Student)
            yield student

    @property
    def teacher(self) -> nn.Module | None:
        return None if self._teacher is None else self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cohort:
        if self._teacher is not None:
            self._teacher[0]._apply(fn)
        super()._apply(fn, recurse)
        self.join()  # what was moved or cast
        return self

    def forward(self, images: Tensor) -> CohortOutput:
        """Runs every student on one batch.

        ``images``: uint8 ``[B, H, W, 3]``, normalised and cast here in one pass; or floating point
        ``[B, 3, H, W]``, taken as normalised already. With a first dimension V there is a view for each
        student that runs here, in their order, one for a companion that reads its own, and a last one for
        the teacher.

        Raises:
            UserError: V isn't the number of these networks.
        """
        companion, S = self.companion, len(self.own)
        apart = companion is not None and companion.own_view
        V = count_views(images, S, teacher=self._teacher is not None, companion=apart)
        if (
            companion is not None
            and self.training
            and not (companion.refreshed_apart and torch.compiler.is_compiling())
        ):
            companion.refresh(self)
        x_NCHW = normalize(
            images if V is None else images.flatten(0, 1),
            self.scale_C,
            self.shift_C,
            _compute_dtype(self.scale_C),
        ).contiguous(memory_format=self.memory_format)
        views = [x_NCHW] if V is None else list(x_NCHW.chunk(V))
        read = views[: len(self.own)]
        trunk_BCHW: Tensor | None = None
        trunk_maps: list[tuple[Tensor, ...]] = [()]
        if self.trunk is not None:
            with narrowed(self._trunk_sites):
                trunk = run_trunk(self.trunk, self.branch_from, read, self.trunk_views)
            trunk_BCHW, trunk_maps = trunk.mean_BCHW, trunk.maps
            read = [ScaleGradient.apply(x, self.trunk_grad_scale) for x in trunk.outputs]
        outputs = self._run(read)
        if self._exchange is not None:
            outputs = self._exchange(outputs)
        extra_logits_EBC = None
        if self._teacher is not None:
            with torch.no_grad():
                extra_logits_EBC = self._teacher[0](views[-1])[None]
        companion_EBC: Tensor | None = None
        if companion is not None and self.training:
            seen = x_NCHW if V is None else views[S] if apart else torch.stack(views[:S])
            companion_EBC = companion(self, seen)
        pairs = zip(for_each(trunk_maps, len(outputs)), outputs, strict=True)
        return CohortOutput(
            torch.stack([output.logits_BC for output in outputs]),
            tuple(output.features_BD for output in outputs),
            tuple(before + output.maps for before, output in pairs),
            trunk_BCHW,
            extra_logits_EBC,
            self.own,
            self.streams,
            companion_EBC,
        )

    def student_state(self, index: int) -> dict[str, Tensor]:
        """The state of student ``index`` under its plain keys, the trunk's included."""
        own = self.students[index].state_dict()
        return {**(self.trunk.state_dict() if self.trunk is not None else {}), **own}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        for companion in self._companion:
            companion.due.fill_(1.0)
        return super().load_state_dict(with_versions(self, state_dict), strict, assign)

    def student(self, index: int) -> Student:
        """Student ``index`` as a separate, whole model with a copy of the weights."""
        model = create_model(self.model_names[index], self.num_classes, **self.model_options)
        model.to(self.scale_C.dtype).load_state_dict(self.student_state(index))
        return model.train(self.training)


def _names(students: tuple[str, int] | Sequence[str]) -> tuple[str, ...]:
    """One model name for each student."""
    if isinstance(students, str):
        raise UserError(f"students is {students!r}: give a name and a count, ({students!r}, 4)")
    members = list(students)
    if len(members) == 2 and isinstance(members[0], str) and isinstance(members[1], int):
        members = [members[0]] * members[1]
    if not members:
        raise UserError("a cohort of 0 students can't be trained: ask for at least 1")
    if not all(isinstance(name, str) for name in members):
        raise UserError(f"students is {students!r}: give a name and a count, or a list of names")
    return tuple(str(name) for name in members)


def _compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype of the first convolution's input: autocast's if it is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
