"""What one training step changes, and how this process takes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Choice, Cohort
from fastokd.cohort.companion import Companion
from fastokd.device import autocast, gradient_scaler, release_memory
from fastokd.distributed.ranks import Ranks
from fastokd.errors import UserError
from fastokd.learner.average import Average
from fastokd.learner.captured import WARM_UP_STEPS, CapturedStep, check_captures
from fastokd.learner.guard import Guard, Held, Shared, set_random_state
from fastokd.learner.norms import norms_of
from fastokd.learner.optimizers import as_state, made_ready
from fastokd.learner.replicas import Replicas
from fastokd.learner.student_parallel import StudentParallel
from fastokd.methods import Method, MethodLoss, Progress

# Eager steps before a capture without DDP: the first makes states and tries cuDNN's algorithms, the
# second may compile again.
WARM_UP_ALONE = 3
# Where a step's draws have a teacher's cached logits, [B, C].
TAUGHT = "teacher_logits"

Forward = Callable[[Tensor, Tensor, Progress], tuple[Tensor, Tensor | None, MethodLoss]]


class Learner:
    """The cohort, its method, and all that a step needs beside a batch.

    Attributes:
        progress: what changes from step to step, as device tensors that the owner fills.
        scaler: the loss scale of fp16; disabled in other precisions.
        guard: the flag on the device that skips a step which isn't finite.
        average: the average of students' weights over the steps, or None.
        student_parallel: this rank trains a share of the students, or None.
        choice: how the steps run; :meth:`adopt` changes it.
        frozen: the first stages that aren't trained; :meth:`freeze` changes it.
        forward: :meth:`eager`, compiled and inside of DDP where asked for.
        captured: the CUDA graphs of this choice's step, which ``step.py`` makes.
        before: what a step writes in place and no optimizer skips, from before the step.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: Method,
        optimizers: list[torch.optim.Optimizer],
        *,
        device: torch.device,
        precision: str,
        ranks: Ranks,
        student_parallel: StudentParallel | None = None,
        average: Average | None = None,
        accumulate: int = 1,
        min_batch: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        """``accumulate``: parts that a batch is taken in, each of at least ``min_batch`` images;
        ``clip_norm``: the largest norm of all gradients.
        """
        self.cohort, self.method, self.optimizers = cohort, method, optimizers
        self.device, self.precision, self.ranks = device, precision, ranks
        self.student_parallel, self.average = student_parallel, average
        self.accumulate, self.min_batch = accumulate, min_batch
        self.clip_norm = clip_norm
        self.progress = Progress.start(device, dtype=torch.float32)
        self.scaler = gradient_scaler(device, precision)
        self.guard = Guard(device)
        self.choice = Choice()
        self._adopted = False
        self.frozen = 0
        self._before: Before | None = None

    def adopt(self, choice: Choice, *, alone: bool = False) -> None:
        """Runs the students by ``choice`` from the next step on; all state stays as it is.

        ``alone``: the steps that follow are timed or tried on this rank only.

        Raises:
            UserError: the engine can't take these students, or the step can't be captured or have
                streams; the message says why.
        """
        if choice.capture:
            check_captures(self.device)
        if choice.streams and (choice.compile or not choice.capture):
            raise UserError(
                "streams are asked for, but only a captured step that isn't compiled has them: leave "
                "--streams out"
            )
        if choice.compile and self.cohort.recomputes:
            raise UserError(
                "compile is asked for, but a compiled step can't recompute activations: leave "
                "--compile or --checkpoint-activations out"
            )
        with self.autocast():  # the engine checks the dtype that it will run in
            self.cohort.set_engine(choice.engine, choice.streams)
        self.cohort.set_memory_format(choice.torch_memory_format)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        # A fused optimizer walks through both as they lie in memory.
                        state[key] = as_state(value, parameter)
        if self.average is not None:  # so does a multi-tensor operation, else it is one a tensor
            for index, averaged in self.average.states.items():
                live = self.cohort.student_state(index)
                averaged.update({k: as_state(value, live[k]) for k, value in averaged.items()})
        self.choice, self._adopted = choice, True
        self._before = None
        self.forward: Forward = self.eager
        if choice.compile:
            self.forward = torch.compile(self.eager, dynamic=False)
        companion = self.cohort.companion
        if companion is not None:
            companion.refreshed_apart = choice.compile
            if choice.compile:
                self.forward = partial(self._refreshed, companion, self.forward)
        self.replicas: Replicas | None = None
        if self.ranks.data.size > 1 and not alone:
            # DDP's accumulators of gradients are on the step's own stream.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(not choice.streams)
            self.forward = self.replicas = Replicas(
                self.forward,
                self.cohort,
                self.method,
                self.ranks.data.group,
                accumulates=self.accumulate > 1,
            )
        self.captured: CapturedStep | None = None
        self.guard.share = None if alone or self.ranks.size == 1 else self.ranks.largest

    def freeze(self, stages: int) -> None:
        """Trains all but the first ``stages`` stages of each student from the next step on (0: all of
        them are trained, -1: heads only). Compiled, captured and DDP's steps are made anew."""
        if stages != self.frozen:
            self.cohort.freeze(stages)
            self.frozen = stages
            if self._adopted:
                self.adopt(self.choice)

    @property
    def warm_up(self) -> int:
        """Eager steps before the first capture."""
        return WARM_UP_ALONE if self.replicas is None else WARM_UP_STEPS

    def why_not_captured(self) -> str | None:
        """Why a step of this learner can't be captured on a GPU, or None where it may.

        A step that waits for the device is found by its capture alone.
        """
        if self.cohort.recomputes and any(":" in name for name in self.cohort.model_names):
            return (
                "to recompute the blocks of another library's network the host reads random states"
            )
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if not all(isinstance(group["lr"], Tensor) for group in groups):
            return (
                "its optimizer reads the learning rate on the host, so that a graph would keep one"
            )
        return None

    def give_up_capture(self) -> None:
        """After a capture that failed: the step hasn't begun, and is eager as all that follow.

        A failed capture computed nothing on the device. Its Python code left gradients without
        values, fp16's scaler between two calls, and may have drawn random numbers.
        """
        set_random_state(self.guard.withdraw(), self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()
        self.adopt(replace(self.choice, capture=False, streams=False))
        release_memory(self.device)

    def eager(
        self, images_BHWC: Tensor, labels_B: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor | None, MethodLoss]:
        """The forward pass: the students' logits, a teacher's, the loss."""
        with self.autocast():
            out = self.cohort(images_BHWC)
            if TAUGHT in progress.draws:
                out.extra_logits_EBC = progress.draws[TAUGHT][None].to(out.logits_SBC.dtype)
            loss = self.method(out, labels_B, progress)
            if self.student_parallel is not None:
                loss = self.student_parallel.whole(loss)
        return out.logits_SBC, out.extra_logits_EBC, loss

    def _refreshed(
        self,
        companion: Companion,
        forward: Forward,
        images_BHWC: Tensor,
        labels_B: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, Tensor | None, MethodLoss]:
        """``forward`` with a companion that is refreshed before: a compiler can't follow how."""
        if self.cohort.training:
            companion.refresh(self.cohort)
        return forward(images_BHWC, labels_B, progress)

    def autocast(self) -> Any:
        """The context of the forward pass."""
        return autocast(self.device, self.precision)

    def train(self, mode: bool = True) -> None:
        """Puts cohort and method in training mode."""
        self.cohort.train(mode)
        self.method.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, the method's included."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def parts_of(self, batch: int) -> int:
        """The number of parts that a batch of ``batch`` images is taken in."""
        return max(1, min(self.accumulate, batch // self.min_batch))

    def sending(self, last: bool) -> AbstractContextManager[Any]:
        """DDP averages gradients in the backward of the last part only."""
        return nullcontext() if last or self.replicas is None else self.replicas.apart()

    @property
    def before(self) -> Before:
        if self._before is None:
            self._before = Before(self)
        return self._before


class Before:
    """What a step writes in place and no optimizer skips: running statistics, and the rest.

    The rest: other buffers but for the method's unguarded ones, the average, what an optimizer without a
    flag writes, and all parameters where the method has an ``after_step``.
    """

    def __init__(self, learner: Learner) -> None:
        modules = (learner.cohort, learner.method)
        statistics = running_statistics(*modules)
        rest = [x for module in modules for x in module.buffers()]
        if learner.average is not None:
            rest += learner.average.tensors()
        for optimizer in learner.optimizers:
            rest += made_ready(optimizer)
        self.written_after = type(learner.method).after_step is not Method.after_step
        if self.written_after:
            rest += [p for module in modules for p in module.parameters()]
        rest = list({id(x): x for x in rest}.values())
        known = {id(x) for x in (*statistics, *learner.method.unguarded())}
        self.statistics = Held(statistics)
        self.rest = Held(x for x in rest if id(x) not in known)
        # The parts of an accumulated batch each start from these, where the method reads them.
        self.read: Shared | None = None
        if learner.method.needs.running_statistics:
            self.read = Shared(running_statistics(learner.method))

    def take(self) -> None:
        """Copies the values before the step."""
        self.statistics.take()
        self.rest.take()

    def put_back(self, untaken: Tensor) -> None:
        """Restores the copies where the 0-d ``untaken`` isn't 0."""
        if self.written_after:
            self.statistics.look()  # after_step may have written them, too
        self.statistics.put_back(untaken)
        self.rest.put_back(untaken)


def running_statistics(*modules: nn.Module) -> list[Tensor]:
    """The running means and variances of all norms."""
    norms = norms_of(*modules)
    return [x for n in norms for x in (n.running_mean, n.running_var) if x is not None]
