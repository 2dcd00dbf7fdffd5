"""What each process of a pool runs; the same functions run alone give what is expected."""

from __future__ import annotations

import importlib
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastokd
from fastokd.checkpoint import list_checkpoints, newest_checkpoint
from fastokd.cohort import Choice, shadows
from fastokd.data import BatchStream
from fastokd.errors import Interrupted, UserError
from fastokd.evaluate import Evaluator
from fastokd.learner.step import training_step
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.autotuner import Timing
from fastokd.run.build import build
from fastokd.run.interruption import StopRequest
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.trial import job, time_here, trial_here
from fastokd.run.tuning import tune, untouched

PLAIN: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop", "impl": "torch"}


def small(name: str, **changes: Any) -> Recipe:
    return recipe(f"{name}/resnet8/digits", **{"students": 3, "batch_size": 8, **changes})


def modern(name: str, **changes: Any) -> Recipe:
    """What people train with today, on 16 images (``pictures`` in conftest.py): two steps an epoch, of
    which the first one has mixed images and frozen stages."""
    settings: dict[str, Any] = {
        **{"epochs": 2, "students": 2, "batch_size": 8, "lr": 0.01, "views": "student"},
        **{"auto_augment": "randaugment", "random_erasing": 0.5},
        **{"mixup": 0.4, "cutmix": 1.0, "mix_each": True, "mix_epochs": 1},
        **{"criterion": "bce", "label_smoothing": 0.1},
        **{"schedule": "cosine", "schedule_by": "step", "decay_norms": False, "head_lr": 0.02},
        **{"frozen_stages": 2, "frozen_epochs": 1},
        **{"ema": 0.9, "average_students": "all", "average_every": 2},
    }
    return recipe(f"{name}/resnet8/imagefolder", **{**settings, **changes})


def averaged(**changes: Any) -> Recipe:
    """Two students whose averages have recomputed statistics."""
    settings: dict[str, Any] = {"ema": 0.0, "swa": True, "average_norms": "recomputed"}
    return modern("dml", frozen_stages=0, frozen_epochs=0, **settings, **changes)


def session_of(one: Recipe, frozen: bool = True, **options: Any) -> Session:
    """In float64; with norms by running statistics, which is what parts of a batch agree on."""
    session = build(one, RunOptions(**{**PLAIN, **options}))
    session.learner.cohort.double()
    session.learner.method.double()
    session.learner.cohort.train(not frozen)
    session.learner.method.train(not frozen)
    return session


def steps(one: Recipe, count: int, frozen: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    """The state after some steps, as rank 0 would save it, and the last loss of each rank."""
    session = session_of(one, frozen, **options)
    session.begin_epoch()
    for index in range(count):
        images, labels = session.stream.batch(0, index)
        session.begin_step(len(labels))
        logits_SBC, loss = training_step(session.learner, images, labels)
        session.meter.update(logits_SBC, labels, {"loss": loss.total, **loss.parts})
        session.step += 1
    metrics = session.meter.result(session.learner.ranks)
    tensors = session.state()[0]
    kinds = ("cohort.", "method.", "optim.")
    # Optimizer states are collected on rank 0 alone.
    kept = {
        k: v
        for k, v in tensors.items()
        if k.startswith(kinds[: 3 - bool(session.learner.ranks.rank)])
    }
    return kept | {"loss": torch.tensor(metrics["loss"]), "ce_S": torch.tensor(metrics["ce_S"])}


def looped(
    one: Recipe, count: int, frozen: bool, options: dict[str, Any], evaluated: bool = False
) -> dict[str, Tensor]:
    """:func:`steps` of the loop, over as many epochs as that takes; the state has the averages.

    ``evaluated``: after the steps everything is, with which statistics may be recomputed.
    """
    session = session_of(one, frozen, **options)
    while session.step < count:
        session.begin_epoch()
        for images, *batch in session.batches(lambda: None):
            training_step(session.learner, images, *batch, body=session.whole_step)
            session.finish_step()
            if session.step == count:
                break
        else:
            session.finish_epoch()
    totals = session.meter.result(session.learner.ranks)
    if evaluated:
        Evaluator(session)()
    kinds = ("cohort.", "method.", "ema", "optim.")
    kept = kinds[: 4 - bool(session.learner.ranks.rank)]
    found = {k: v for k, v in session.state()[0].items() if k.startswith(kept)}
    return found | {name: torch.tensor(totals[name]) for name in ("loss", "student_top1")}


def views(one: Recipe, options: dict[str, Any]) -> tuple[int, ...]:
    """The views that this process makes."""
    session = session_of(one, **options)
    assert isinstance(session.stream, BatchStream)
    assert session.next_batch()[0].shape[0] == len(session.stream.views or ())
    return tuple(session.stream.views or ())


def shadowed_steps(
    one: Recipe, count: int, frozen: bool, options: dict[str, Any]
) -> dict[str, Tensor]:
    """:func:`steps` whose weights are cast together, to float64, as on a GPU to bf16."""
    with patch.object(shadows, "target", lambda sites: torch.float64):
        return steps(one, count, frozen, options)


def metrics(one: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    session = session_of(one, **options)
    few = session.data.test.select(torch.arange(99))
    session.data = replace(session.data, val=None, test=few)
    return Evaluator(session)()["test"]


def run(one: Recipe, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A run; its metrics, and its last checkpoint's tensors and facts on rank 0."""
    with patch("fastokd.report.page.report"):  # its plots take longer than these epochs
        done = fastokd.train(one, out=out, **{**PLAIN, **options})
    tensors, facts = newest_checkpoint(out / "checkpoints")[1:3]
    names = [path.name for path in list_checkpoints(out / "checkpoints")]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return {
        "metrics": done.metrics,
        "tensors": tensors if rank == 0 else {},
        "facts": facts,
        "checkpoints": names,
    }


def refusal(one: Recipe, options: dict[str, Any]) -> str:
    """What a session says to options that it can't serve."""
    try:
        session_of(one, **options)
    except UserError as error:
        return str(error)
    return "nothing"


def run_refusal(one: Recipe, out: Path, options: dict[str, Any]) -> str:
    """What a run says."""
    try:
        run(one, out, options)
    except UserError as error:
        return str(error)
    return "nothing"


def stopped(one: Recipe, out: Path) -> dict[str, Any]:
    """A run of which the last rank alone gets a signal, in its second step."""

    class Stop(StopRequest):
        def __enter__(self) -> Stop:
            return self

        @property
        def received(self) -> int | None:
            self.asked += 1
            last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            return signal.SIGTERM if last and self.asked >= 2 else None

        @received.setter
        def received(self, value: int | None) -> None:
            self.asked = 0

    train = importlib.import_module("fastokd.train")
    before = train.StopRequest
    train.StopRequest = Stop
    try:
        run(one, out, {})
    except Interrupted as stop:
        step = newest_checkpoint(out / "checkpoints")[2]["step"]
        return {"signal": stop.signal, "step": step}
    finally:
        train.StopRequest = before
    return {}


def tuned(one: Recipe, cache: Path) -> tuple[str, int]:
    """The engine that a session settles on, and how many candidates this rank timed; only rank 0
    finds one faster."""
    rank = torch.distributed.get_rank()
    session = build(one, RunOptions(**{**PLAIN, "engine": "auto", "compile": False}))
    timings = [Timing(Choice("loop"), 2.0 - rank), Timing(Choice("grouped"), 1.0 + rank)]
    with (
        patch("fastokd.run.tuning._measure", return_value=timings) as measured,
        patch("fastokd.run.tuning.cache_root", return_value=cache),
    ):
        tune(session, 10_000)
    return session.learner.choice.engine, measured.call_count


def refused_tuning(one: Recipe, cache: Path) -> str:
    """What this rank is told where rank 0 finds that nothing runs as it is asked for."""
    session = build(one, RunOptions(**{**PLAIN, "engine": "auto", "compile": True}))
    failed = Timing(session.learner.choice, note="no compiler", failed=True)
    with (
        patch("fastokd.run.tuning._measure", return_value=[failed]),
        patch("fastokd.run.tuning.cache_root", return_value=cache),
    ):
        try:
            tune(session, 10_000)
        except UserError as error:
            return str(error)
    return ""


def settled(one: Recipe, cache: Path, options: dict[str, Any]) -> tuple[str, bool]:
    """What a session of three steps runs by, and whether its engine was open; ``torch.compile`` is a
    stand-in, and nothing may be timed."""
    with (
        patch("torch.compile", side_effect=lambda body, **how: body) as compiled,
        patch("fastokd.run.tuning.cache_root", return_value=cache),
        patch("fastokd.run.tuning.time_here") as measured,
    ):
        session = build(one, RunOptions(**{**PLAIN, "engine": "auto", **options}))
        opened = not session.settled
        tune(session, 3)
        assert session.settled
        assert not measured.called
        assert compiled.called == session.learner.choice.compile
        session.begin_epoch()
        images, labels = session.stream.batch(0, 0)
        session.begin_step(len(labels))
        training_step(session.learner, images, labels)
    return str(session.learner.choice), opened


def statistics_read(one: Recipe) -> list[dict[str, Tensor]]:
    """The running statistics of the method's norms as each of two steps finds them."""
    session = session_of(one, frozen=False)
    found: list[dict[str, Tensor]] = []

    def note(method: torch.nn.Module, arguments: Any) -> None:
        del arguments
        found.append({k: v.clone() for k, v in method.named_buffers() if "running" in k})

    session.learner.method.register_forward_pre_hook(note)
    session.begin_epoch()
    for index in range(2):
        images, labels = session.stream.batch(0, index)
        session.begin_step(len(labels))
        training_step(session.learner, images, labels)
        session.step += 1
    return found


def timed_shares(one: Recipe) -> tuple[int, int]:
    """Images of a step that times an eager candidate here, and a compiled one in its own process."""
    session = build(one, RunOptions(**PLAIN))
    told = json.loads(json.dumps(job(session, Choice("loop", True))))
    sizes: list[int] = []

    def noting(
        steps_session: Session, batch: tuple[Tensor, Tensor], count: int, *_: object
    ) -> list[float]:
        sizes.append(len(batch[1]))
        return [1.0] * count

    with (
        patch("fastokd.run.trial.time_steps", noting),
        # The worker is a process alone.
        patch("fastokd.distributed.ranks.world_size", return_value=1),
    ):
        time_here(session, Choice("loop"), None)
        answer = trial_here(told)[0]
    assert answer.get("step_ms") == 1.0, answer
    eager, compiled = dict.fromkeys(sizes[:2]), dict.fromkeys(sizes[2:])
    assert len(eager) == len(compiled) == 1
    return (*eager, *compiled)


def timed_alone(one: Recipe) -> list[Any]:
    """A step that rank 0 times while the other waits; then one that both take."""
    session = build(one, RunOptions(**PLAIN))
    if session.learner.ranks.rank == 0:
        with untouched(session):
            assert time_here(session, Choice("grouped"), None).step_ms
    session.learner.ranks.wait()
    session.begin_epoch()
    images, labels = session.stream.batch(0, 0)
    session.begin_step(len(labels))
    training_step(session.learner, images, labels)
    return [session.learner.choice.engine, session.learner.cohort.state_dict()]


def clipped(one: Recipe, options: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The norm by which gradients are clipped to 1, where what the students share has the most of
    it; and those gradients."""
    session = session_of(one, **options)
    shared = {id(p) for p in session.learner.method.parameters()}
    for p in session.learner.parameters():
        p.grad = torch.full_like(p, 1.0 if id(p) in shared else 1e-3)
    if session.learner.student_parallel is None:
        norm = torch.nn.utils.clip_grad_norm_(session.learner.parameters(), 1.0)
    else:
        norm = session.learner.student_parallel.clip(session.learner.parameters(), 1.0)
    return norm.item(), {name: p.grad for name, p in session.learner.method.named_parameters()}
