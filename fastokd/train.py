"""The loop: what is trained is the recipe's choice, how it runs is the options'."""

from __future__ import annotations

import shlex
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastokd.data import DatasetSplits
from fastokd.distributed.agreement import Agreement
from fastokd.distributed.launch import joined, of_the_first_rank
from fastokd.distributed.ranks import speaks
from fastokd.errors import DiskError, UserError, as_path, forget, in_one_line, warn
from fastokd.evaluate import Evaluator
from fastokd.host import cpus
from fastokd.host.names import counted, on_a_line
from fastokd.host.streams import say
from fastokd.learner.recording import CaptureError
from fastokd.learner.step import training_step
from fastokd.recipe.file import is_file, label
from fastokd.recipe.names import recipe as named
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.schedule import ENDING
from fastokd.report import page
from fastokd.result import Run
from fastokd.run import folder as run_folder
from fastokd.run.build import build
from fastokd.run.display import Display, show_batch
from fastokd.run.facts import RunFacts, run_path
from fastokd.run.folder import RunFolder
from fastokd.run.hooks import Hooks, spared
from fastokd.run.identity import stays_captured
from fastokd.run.interruption import ECHO, Keeper, StopRequest
from fastokd.run.loggers import check_installed, loggers
from fastokd.run.nonfinite import settle
from fastokd.run.options import RunOptions, chosen, nearest_option
from fastokd.run.out_of_memory import saying_what_fits
from fastokd.run.session import Session
from fastokd.run.tuning import tune

__all__ = ["resume", "train", "train_epoch"]


def train_epoch(session: Session, hooks: Hooks) -> dict[str, Any]:
    """The rest of one epoch; the training metrics of all of it."""
    learner = session.learner
    learner.train()
    session.begin_epoch()
    for B, *batch in session.batches(hooks.on_last_batch):
        with saying_what_fits(session, *batch):
            training_step(learner, B, *batch, body=session.whole_step)
        session.finish_step()
        hooks.on_step(B * learner.ranks.data.size)
    return session.meter.result(learner.ranks)


def train(recipe: str | Recipe, options: RunOptions | None = None, **changes: Any) -> Run:
    """Trains a recipe and leaves a run folder.

    Args:
        recipe: what to train: a name, as ``"okddip-branch/resnet32/cifar100"``, a file, as
            ``"experiment.toml"``, or what :func:`fastokd.recipe` made of one.
        options: where and how.
        changes: single options (``out=``, ``data_root=``); with a name or a file also settings of the recipe
            (``epochs=``, ``temperature=``).

    Raises:
        UserError: data that can't be found, a folder that exists already or can't be written, a
            checkpoint of another recipe, a step that isn't finite (it isn't taken, and the state
            before it is saved); a keyword that is neither an option nor a setting.
        Interrupted: SIGTERM, SIGHUP or ^C came; the step was finished and the state saved.
    """
    if isinstance(recipe, str):
        of_recipe = {k: v for k, v in changes.items() if k not in RunOptions.__dataclass_fields__}
        changes = {name: value for name, value in changes.items() if name not in of_recipe}
        name, recipe = recipe, _named(recipe, of_recipe)
        if is_file(name) and (options or RunOptions()).out is None:
            changes.setdefault("out", Path("runs") / f"{label(name)}-seed{recipe.seed}")
    if not isinstance(recipe, Recipe):
        raise UserError(f"the recipe is {recipe!r}: give a name, or what fastokd.recipe returns")
    options = chosen(options, changes)
    with joined(options.device, bool(options.capture) or _begun_captured(recipe, options)):
        return _train(recipe, options)


def _named(name: str, settings: dict[str, Any]) -> Recipe:
    """The recipe called ``name``; the error about a setting may offer an option of the run."""
    try:
        return named(name, **settings)
    except UserError as error:
        for key in settings.keys() - Recipe.__dataclass_fields__.keys():
            if f"unknown setting {key!r}" in str(error) and (near := nearest_option(key)):
                raise UserError(f"unknown setting {key!r}: did you mean {near}?") from error
        raise


def _begun_captured(recipe: Recipe, options: RunOptions) -> bool:
    """Whether a resumed run captures its steps: NCCL is set up for that before the ranks join."""
    if not options.resume:
        return False
    try:
        return stays_captured(RunFacts(run_path(recipe, options)).environment())
    except UserError:  # raised again where the folder is claimed
        return False


def _train(recipe: Recipe, options: RunOptions) -> Run:
    """The run of this process, or this process's part of it."""
    if not speaks():
        options = replace(options, quiet=True, tensorboard=False, wandb=False)
    asked = {"tensorboard": options.tensorboard, "wandb": options.wandb}
    check_installed(**asked)
    folder = RunFolder.claim(recipe, options)
    session = build(recipe, folder.as_begun(options))
    ranks = session.learner.ranks
    tell = _silent if options.quiet else say
    for note in session.notes:
        tell(note)
    with StopRequest(echo=ECHO if ranks.size > 1 else 0.0) as stop, closing(folder):
        with Hooks() as hooks:
            with folder.beginning(session):
                found = loggers(recipe, folder.path, session.step, **asked)
                ranks.first(lambda: hooks.add(*found))
            if not options.quiet:  # looking takes 0.2 s
                tell(cpus.said())
            if options.show_augmentation:
                picture = on_a_line(show_batch(session, folder.path))
                tell(f"a batch as the students see it: {picture}")
            if session.is_over:
                tell(_why_over(session))
            elif not session.settled:
                # A signal ends the run here: nothing was trained since the last checkpoint.
                folder.settled(session, tune(session, session.steps_left, tell, stop))
            quiet = options.quiet or session.is_over
            hooks.try_add(lambda: Display(session, quiet), Display.title)
            try:
                run = _train_epochs(session, folder, hooks, stop)
            finally:
                session.learner.captured = None  # its graphs refer to the learner
        with stop.telling(_give_up):
            ranks.first(lambda: _report(folder.path, session.data))
    return Run(run.folder, run.recipe, run.metrics)


def _train_epochs(
    session: Session, folder: RunFolder, hooks: Hooks, stop: StopRequest
) -> run_folder.Run:
    """Every epoch that is left. The run's last files are written before any hook is told of the end."""
    recipe, options, learner = session.recipe, session.options, session.learner
    keeper = Keeper(
        lambda background: folder.save(session, background=background),
        stop,
        options.save_every_steps,
        options.save_every_minutes,
        settle=lambda: settle(session, lambda: folder.save(session)),
        agree=Agreement(learner.ranks),
        is_over=lambda: session.is_over,
    )
    hooks.add(keeper)
    evaluator = Evaluator(session)
    run = None
    with folder.keeping(session, keeper.save_now):
        while not session.is_over:
            started, images, waited = time.perf_counter(), hooks.images, session.waited
            try:
                train_metrics = train_epoch(session, hooks)
            except CaptureError as error:
                if learner.ranks.size > 1 or (options.capture and not options.resume):
                    raise
                evaluator = Evaluator(session)  # without graphs
                _go_on_eagerly(session, folder, error)
                continue
            seconds = time.perf_counter() - started
            row: dict[str, Any] = {
                "epoch": session.epoch,
                "step": session.step,
                "seconds": seconds,
                "images_per_second": (hooks.images - images) / seconds,
                "lr": session.last_rate,
                "kd_weight": learner.progress.ramp.item(),
                "skipped_steps": session.skipped,
                "train": train_metrics,
            }
            if session.waited > waited:
                row["data_seconds"] = session.waited - waited
            last = session.stopped or session.epoch + 1 == recipe.epochs
            if last or (session.epoch + 1) % options.eval_every == 0:
                started = time.perf_counter()
                row |= evaluator(hooks.on_batch)
                row["eval_seconds"] = time.perf_counter() - started
            session.finish_epoch()
            folder.record(session, row)
            if session.is_over:
                run = folder.finish(session)
            hooks.on_epoch(row)
    return run or folder.finish(session)


def _go_on_eagerly(session: Session, folder: RunFolder, error: CaptureError) -> None:
    """The run goes on from the step whose capture failed, without capture."""
    forget(error)  # its frames hold the graphs of other batch sizes
    session.learner.give_up_capture()
    why = in_one_line(error.__cause__ or error)
    warn(f"the step can't be captured as a CUDA graph ({why}): the run continues eagerly")
    again = "a resumed run will try to capture the step again"
    spared(lambda: folder.changed(session), again, of=DiskError)


def _report(folder: Path, data: DatasetSplits | None = None) -> None:
    """The page with its plots; where it can't be made, a warning says how to make it later."""
    command = f"fastokd report {shlex.quote(str(folder))}"
    why = f"the run is done, but there is no report (`{command}` makes it)"
    spared(lambda: page.report([folder], data=data), why, of=BaseException)


def _give_up() -> None:
    """A signal while the report is made ends the report, and not the run, which is done."""
    raise KeyboardInterrupt


def _silent(text: str) -> None:
    del text


def _why_over(session: Session) -> str:
    """Why a resumed run has no step left."""
    done, epochs = session.epoch, session.recipe.epochs
    if done >= epochs:
        whole = f"{done} of {counted(epochs, 'epoch')}"
        return f"the run is finished: {whole}; a larger --epochs trains it further"
    taken = counted(session.step, "step")
    return f"the run has taken {taken}, and --max-steps is {session.options.max_steps}"


def resume(
    folder: str | Path | Run,
    options: RunOptions | None = None,
    *,
    epochs: int | None = None,
    **changes: Any,
) -> Run:
    """Continues the run in ``folder`` by its own recipe.

    Args:
        options, changes: as for :func:`train`. Only options that don't change the run's numbers may
            differ from those it was begun with: ``max_steps``, ``data_root``, ``workers`` and such.
        epochs: more epochs than it was begun with. The schedule isn't scaled: the new epochs have
            the learning rate of the last one, unless a milestone lies between.

    Raises:
        UserError: there is no run; fewer epochs than it was begun with; as :func:`train`.
    """
    folder = as_path("the run folder", folder)
    options = replace(chosen(options, changes), out=folder, resume=True)
    begun, longer = recipe_to_resume(folder), recipe_to_resume(folder, epochs)
    if longer != begun and not options.quiet and of_the_first_rank():
        say(
            f"{counted(longer.epochs, 'epoch')} in place of {begun.epochs}: the schedule stays as it was "
            f"begun, and the rate of the last epoch is {longer.learning_rate(longer.epochs - 1):g}"
        )
    return train(longer, options)


def recipe_to_resume(folder: Path, epochs: int | None = None) -> Recipe:
    """The recipe of the run in ``folder``; with more ``epochs``, whose schedule isn't scaled, so that
    the epochs before stay as they were.

    Raises:
        UserError: there is no run, or it was begun with more than ``epochs``.
    """
    begun = RunFolder(folder).recipe()
    longer = begun if epochs is None else replace(begun, epochs=epochs)
    if longer.epochs < begun.epochs:
        raise UserError(
            f"epochs is {epochs}, but the run in {folder} was begun with {begun.epochs}: give more, or "
            "stop it sooner with --max-steps"
        )
    if longer.epochs > begun.epochs and begun.schedule in ENDING:
        raise UserError(
            f"epochs is {epochs}, but the run in {folder} was begun with {begun.epochs}, at whose end its "
            f"schedule {begun.schedule} ends: begin a longer run, from its weights with --init if you like"
        )
    return longer
