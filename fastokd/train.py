"""The loop. What is trained is the recipe's business, how it is run the session's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastokd.distributed.agreement import Agreement
from fastokd.distributed.launch import joined
from fastokd.distributed.ranks import speaks
from fastokd.errors import UserError
from fastokd.evaluate import evaluate_session
from fastokd.host import cpus
from fastokd.host.names import on_a_line
from fastokd.host.streams import say
from fastokd.learner.step import training_step
from fastokd.recipe.names import Recipe
from fastokd.run.display import Display
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run, RunFolder
from fastokd.run.hooks import Watchers
from fastokd.run.interruption import ECHO, Keeper, StopRequest
from fastokd.run.loggers import check_installed, loggers
from fastokd.run.nonfinite import settle
from fastokd.run.out_of_memory import saying_what_fits
from fastokd.run.session import RunOptions, Session, run_path
from fastokd.run.tuning import tune

__all__ = ["resume", "train", "train_epoch", "training_step"]


def train_epoch(session: Session, told: Watchers, keeper: Keeper) -> dict[str, Any]:
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
        told.step(labels_B.shape[0] * session.ranks.data.size)
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
    tell = _silent if options.quiet else say
    for note in session.began_from:
        tell(note)
    with closing(folder), StopRequest(echo=ECHO if session.ranks.size > 1 else 0.0) as stop:
        with Watchers() as told:
            with folder.beginning(session):
                found = loggers(recipe, folder.path, session.step, **asked)
                session.ranks.first(lambda: told.begin(*found))
            if not options.quiet:  # looking takes 0.2 s
                tell(cpus.said())
            if options.show_augmentation:
                picture = on_a_line(folder.show_batch(session))
                tell(f"a batch as the students see it: {picture}")
            if not session.settled:
                timings = tune(session, session.steps_left, tell, stop)
                if session.settled:  # else a signal came, and the resumed run chooses
                    folder.settled(session, timings)
            told.add(lambda: Display(session, options.quiet), Display.title)
            run = _train_epochs(session, folder, told, stop)
        with stop.telling(_give_up):
            folder.report(session)
    return run


def _train_epochs(session: Session, folder: RunFolder, told: Watchers, stop: StopRequest) -> Run:
    """Every epoch that is left. What the run is for is written before anybody is told of it."""
    recipe, options = session.recipe, session.options
    keeper = Keeper(
        lambda: folder.save(session),
        stop,
        options.save_every_steps,
        options.save_every_minutes,
        check=lambda: settle(session, lambda: folder.save(session)),
        agree=Agreement(session.ranks),
    )
    run = None
    with folder.keeping(session, keeper.save_now):
        while not _is_over(session):
            started, images = time.perf_counter(), told.images
            train_metrics = train_epoch(session, told, keeper)
            seconds = time.perf_counter() - started
            row: dict[str, Any] = {
                "epoch": session.epoch,
                "step": session.step,
                "seconds": seconds,
                "images_per_second": (told.images - images) / seconds,
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
            if _is_over(session):
                run = folder.finish(session)
            told.row(row)
            keeper.saved()
            if run is None:
                keeper()
    return run or folder.finish(session)


def _is_over(session: Session) -> bool:
    return session.epoch >= session.recipe.epochs or session.stopped


def _give_up() -> None:
    """A signal while the report is made ends the report, and not the run, which is done."""
    raise KeyboardInterrupt


def _silent(text: str) -> None:
    del text


def resume(folder: Path, **changes: Any) -> Run:
    """Continues the run in ``folder`` under its own recipe."""
    return train(RunFolder(folder).recipe(), out=folder, resume=True, **changes)
