"""The loop. What is trained is the recipe's business, how it is run the session's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastokd import cpus
from fastokd.distributed.agreement import Agreement
from fastokd.distributed.launch import joined
from fastokd.distributed.ranks import speaks
from fastokd.errors import UserError
from fastokd.evaluate import evaluate_session
from fastokd.recipes import Recipe
from fastokd.training.display import Display
from fastokd.training.interruption import ECHO, Keeper, StopRequest
from fastokd.training.nonfinite import settle
from fastokd.training.out_of_memory import saying_what_fits
from fastokd.training.run_facts import RunFacts
from fastokd.training.run_folder import Run, RunFolder
from fastokd.training.session import RunOptions, Session, run_path
from fastokd.training.step import training_step
from fastokd.training.tuning import tune
from fastokd.training.watchers import check_installed, watchers

__all__ = ["resume", "train", "train_epoch", "training_step"]


def train_epoch(session: Session, display: Display, keeper: Keeper) -> dict[str, Any]:
    """The rest of one epoch; the training metrics of all of it."""
    session.cohort.train()
    session.method.train()
    session.begin_epoch()
    for images_BHWC, labels_B in batches(session, keeper):
        session.begin_step(labels_B.shape[0])
        with saying_what_fits(session, images_BHWC, labels_B):
            logits_SBC, loss = training_step(session, images_BHWC, labels_B)
        losses = {"loss": loss.total, **loss.parts}
        session.meter.update(logits_SBC, labels_B, losses, session.guard.fault)
        session.batch += 1
        session.step += 1
        display.step(labels_B.shape[0] * session.ranks.data.size)
        keeper.stepped()
    return session.meter.result(session.ranks)


def batches(session: Session, keeper: Keeper) -> Iterator[tuple[Tensor, Tensor]]:
    """The rest of one epoch, and again what comes after a step that wasn't taken."""
    while session.batch < len(session.stream) and not session.stopped:
        for batch in session.stream.batches(session.epoch, session.batch):
            index = session.batch
            yield batch
            if session.stopped or session.batch != index + 1:
                break
        keeper.check()


def train(recipe: Recipe, options: RunOptions | None = None, **changes: Any) -> Run:
    """Trains a recipe and leaves a run folder.

    Args:
        recipe: what to train (:func:`fastokd.recipe` makes one by name).
        options: where and how; single fields may be given as keywords (``out=``, ``data_root=``).

    Raises:
        UserError: data that can't be found, a folder that exists already or can't be written, a
            checkpoint of another recipe, a step that isn't finite (it isn't taken, and the state
            before it is saved); a keyword that is no option, as a setting of the recipe.
        Interrupted: SIGTERM, SIGHUP or ^C came; the step was finished and the state saved.
    """
    for name, value in changes.items():
        if name not in RunOptions.__dataclass_fields__:
            raise UserError(
                f"{name}={value!r} is no option of a run: a setting of the recipe is given to "
                "fastokd.recipe(name, ...)"
            )
    options = replace(options or RunOptions(), **changes)
    with joined(options.device, options.capture or _begun_captured(recipe, options)):
        return _train(recipe, options)


def _begun_captured(recipe: Recipe, options: RunOptions) -> bool:
    """Whether a resumed run captures its steps: NCCL is set up for that before the ranks join."""
    if not options.resume:
        return False
    try:
        return bool(RunFacts(run_path(recipe, options)).environment().get("capture"))
    except UserError:  # raised again where the folder is claimed
        return False


def _train(recipe: Recipe, options: RunOptions) -> Run:
    """The run of this process, or this process's part of it."""
    if not speaks():
        options = replace(options, quiet=True, tensorboard=False, wandb=False)
    asked = {"tensorboard": options.tensorboard, "wandb": options.wandb}
    check_installed(**asked)
    folder = RunFolder.claim(recipe, options)
    session = Session(recipe, folder.as_begun(options))
    say = _silent if options.quiet else print
    for note in session.began_from:
        say(note)
    with closing(folder), StopRequest(echo=ECHO if session.ranks.size > 1 else 0.0) as stop:
        folder.open(session)
        if not options.quiet:  # looking takes 0.2 s
            say(cpus.said())
        if options.show_augmentation:
            say(f"a batch as the students see it: {folder.show_batch(session)}")
        others = watchers(recipe, folder.path, session.step, **asked)
        if not session.settled:
            timings = tune(session, session.steps_left, say, stop)
            if session.settled:  # else a signal came, and the resumed run chooses
                folder.settled(session, timings)
        keeper = Keeper(
            lambda: folder.save(session),
            stop,
            options.save_every_steps,
            options.save_every_minutes,
            check=lambda: settle(session, lambda: folder.save(session)),
            agree=Agreement(session.ranks),
        )
        keeping = folder.keeping(session, keeper.save_now)
        with Display(session, options.quiet, others) as display, keeping:
            while session.epoch < recipe.epochs and not session.stopped:
                started, images = time.perf_counter(), display.images
                train_metrics = train_epoch(session, display, keeper)
                seconds = time.perf_counter() - started
                row: dict[str, Any] = {
                    "epoch": session.epoch,
                    "step": session.step,
                    "seconds": seconds,
                    "images_per_second": (display.images - images) / seconds,
                    "lr": recipe.learning_rate(session.epoch),
                    "kd_weight": session.progress.ramp.item(),
                    "skipped_steps": session.skipped,
                    "train": train_metrics,
                }
                last = session.stopped or session.epoch + 1 == recipe.epochs
                if last or (session.epoch + 1) % options.eval_every == 0:
                    row |= evaluate_session(session, keeper)
                session.finish_epoch()
                folder.record(session, row)
                display.epoch(row)
                keeper.saved()
                keeper()
        return folder.finish(session)


def _silent(text: str) -> None:
    del text


def resume(folder: Path, **changes: Any) -> Run:
    """Continues the run in ``folder`` under its own recipe."""
    return train(RunFolder(folder).recipe(), out=folder, resume=True, **changes)
