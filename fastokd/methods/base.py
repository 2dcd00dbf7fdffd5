"""The base class of methods: a module that computes the loss and declares what it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.cohort.sharing import SHARINGS
from fastokd.errors import UserError
from fastokd.methods.label_loss import LabelLoss

# The draw of a step that holds the images' numbers in the training set, int64 ``[B]``.
INDEX = "index_B"


@dataclass(frozen=True)
class Needs:
    """What a method requires of its cohort.

    ``sharing``: the forms that it has. ``leader``: the last student is kept and the others are its
    peers. ``trunk``, ``maps``: it reads them from the output. ``teacher``: it needs a trained teacher.
    ``heldout``: it evaluates the students after each epoch on images held out of the training set.
    ``divide_trunk_gradient``: the gradient into the trunk is divided by the number of students.
    ``min_batch``: the smallest batch that its own norms can train on; a smaller last batch of an epoch
    is left out. ``own_rows``: with students spread over ranks, its loss covers this rank's students
    (``out.own``) and the ranks' losses are summed; else each rank computes the loss of all students.
    ``running_statistics``: it reads its norms' running statistics in training. ``label_loss``: it uses
    :attr:`Method.label_loss`. ``mixed_labels``: it passes ``progress.mixed_with`` to its losses.
    ``companion``: networks run beside the students and are kept in their place (``cohort/companion.py``):
    ``"each"``: one for each student, on its view; ``"one"``: one for all, on a view of its own.
    ``training_set``: :meth:`Method.start` is called with the training set's labels, and the draws have
    the images' numbers in it (``INDEX``).
    """

    sharing: tuple[str, ...] = SHARINGS
    min_students: int = 2
    leader: bool = False
    trunk: bool = False
    maps: bool = False
    teacher: bool = False
    heldout: bool = False
    divide_trunk_gradient: bool = False
    min_batch: int = 1
    own_rows: bool = False
    running_statistics: bool = False
    label_loss: bool = False
    mixed_labels: bool = False
    companion: Literal["none", "each", "one"] = "none"
    training_set: bool = False

    def check(self, method: str, sharing: str, students: int) -> None:
        """Raises UserError if ``method`` lacks this sharing or needs more students."""
        if sharing not in self.sharing:
            raise UserError(f"{method} has no {sharing} form: choose {' or '.join(self.sharing)}")
        if students < self.min_students:
            role = " (a leader and at least one peer)" if self.leader else ""
            raise UserError(
                f"students is {students}, but {method} trains at least {self.min_students}{role}"
            )


class MethodLoss(NamedTuple):
    """``total`` is differentiated; ``parts``, its terms by name, are detached and stay on the device.

    ``kept``, detached, of any shape ``[..., B, D]``, is what :meth:`Method.keep` gets after the step.
    """

    total: Tensor
    parts: dict[str, Tensor]
    kept: Tensor | None = None


@dataclass
class Progress:
    """What changes from step to step, as 0-d tensors on the device, filled before the step.

    A CUDA graph would keep a Python number as a constant. ``epoch`` counts from 0; ``ramp`` is the
    recipe's weight of the distillation terms, in [0, 1]; ``draws`` is the result of
    :meth:`Method.draw` for this step; ``mixed_with`` is ``(labels2_B, share2_B)`` where the batch's images
    are mixed (Mixup, CutMix): the second class ids, int64, and their shares of the labels, in [0, 1].
    """

    epoch: Tensor
    ramp: Tensor
    draws: dict[str, Tensor] = field(default_factory=dict)
    mixed_with: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def start(
        device: torch.device | str = "cpu",
        ramp: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> Progress:
        """The first epoch. The ramp's ``dtype`` should be at least as precise as the cohort's."""
        return Progress(
            torch.zeros((), device=device), torch.full((), ramp, device=device, dtype=dtype)
        )


@dataclass(frozen=True)
class OptimGroup:
    """Parameters that share an optimizer's settings; None stands for the recipe's value.

    ``optimizer``: ``"adam"`` is torch's Adam at its defaults, whatever the recipe's optimizer.
    ``warm_up``: the recipe's warm-up applies to them; its milestones apply to all ``scheduled`` ones.
    """

    parameters: list[nn.Parameter]
    optimizer: Literal["adam"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    scheduled: bool = True
    warm_up: bool = True


class Method(nn.Module):
    """The base of every method.

    A method is built from a :class:`CohortShape` and its own options; its parameters (projections,
    gates, fusion) are its submodules. Only ``forward`` must be written.

    Attributes:
        label_loss: the recipe's settings of the terms with labels, which replace the default one where
            ``needs.label_loss``.
    """

    needs = Needs()

    def __init__(self, shape: CohortShape) -> None:
        super().__init__()
        self.shape = replace(shape, cohort=None)  # a copy of the method doesn't copy the cohort
        self.label_loss = LabelLoss()
        self.needs.check(type(self).__name__, shape.sharing, shape.students)
        if isinstance(shape.cohort, Cohort):
            shape.cohort.accompany(None)  # another method's

    @property
    def peers(self) -> int:
        """The students that aren't the leader."""
        return self.shape.students - int(self.needs.leader)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        """The loss of one batch."""
        raise NotImplementedError

    def optim_groups(self) -> Iterable[OptimGroup]:
        """How the method's own parameters are optimised: by default as the students' are."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [OptimGroup(parameters)] if parameters else []

    def begin(self, cohort: Cohort) -> None:
        """Sets initial weights of the students that the method needs, once, without gradient, before any
        weights are loaded. A script without a recipe calls it where it wants them."""

    def start(self, labels_N: Tensor, generator: Generator) -> None:
        """Called before a run's first step where ``needs.training_set``, with the class ids of all
        training images; ``generator`` is on the CPU."""

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """The random tensors of one step, on the CPU; ``forward`` gets them as ``progress.draws``.

        Their first dimension is the batch, so that gradient accumulation can split them. A function of
        ``batch`` and ``generator`` within an epoch: many steps are drawn ahead.
        """
        del batch, generator
        return {}

    def belongs_to(self, name: str) -> int | None:
        """The student with which the method's parameter or buffer ``name`` is trained; None: with all.

        With students spread over ranks, it is trained on that student's rank only.
        """
        del name
        return None

    def after_step(self, cohort: Cohort, progress: Progress) -> None:
        """Runs after the optimizer in every step, without gradient: averages of parameters, hybrids.

        It may be captured in a CUDA graph, so its conditions are device tensors. What it writes in
        cohort and method is restored if the step is skipped; checkpoints contain their state dicts.
        """

    def unguarded(self) -> Iterable[Tensor]:
        """Buffers that are too large for a copy in every step: only :meth:`keep` may write them."""
        return []

    def keep(self, kept: Tensor, progress: Progress, untaken: Tensor) -> None:
        """Runs at the end of every step whose losses have ``kept``, without gradient, with the losses' ``kept`` of the whole batch.

        Where the 0-d ``untaken`` isn't 0 the step is skipped, and it must change nothing: what it writes
        in :meth:`unguarded` isn't restored. It may be captured in a CUDA graph.
        """

    def end_epoch(self, cohort: Cohort, heldout: tuple[Tensor, Tensor] | None) -> None:
        """Updates the method after an epoch; ``heldout`` are images and labels."""
        del cohort, heldout

    def classifiers(self, out: CohortOutput) -> dict[str, Tensor]:
        """The logits ``[B, C]``, by name, of classifiers beside the students, which evaluations score."""
        del out
        return {}

    def diagnostics(self, out: CohortOutput) -> dict[str, Tensor]:
        """Values to log, averaged over the batch; ``attention`` is the mixing matrix."""
        del out
        return {}


def ramp_weight(epoch: float, length: float) -> float:
    """w(t) = exp(-5 (1 - min(t, R) / R)^2), and 1 where R is 0 (FIDELITY: OKDDip's ramp-up)."""
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


def no_one(students: int, sources: int | None = None) -> Tensor:
    """``[S, N]`` scores of -inf: no student listens to any source."""
    return torch.full((students, sources or students), -math.inf)
