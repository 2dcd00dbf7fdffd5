"""Builds a session from a recipe and options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastokd.checkpoint import fingerprint, list_checkpoints
from fastokd.cohort import Choice, Cohort
from fastokd.data import DatasetSplits
from fastokd.device import (
    pick_precision,
    set_kernel_selection,
    set_matmul_precision,
    use_device,
)
from fastokd.distributed.launch import device_here
from fastokd.distributed.ranks import Ranks, first, speaks
from fastokd.errors import UserError
from fastokd.host.streams import say
from fastokd.learner.allocator import keep_freed_memory
from fastokd.learner.average import Average, Averaging
from fastokd.learner.build import build_cohort, build_optimizers
from fastokd.learner.captured import check_captures
from fastokd.learner.learner import Learner
from fastokd.learner.student_parallel import StudentParallel
from fastokd.learner.sync_norm import synchronise
from fastokd.methods import Method, method_class
from fastokd.methods.label_loss import balanced_weights
from fastokd.models import least_batch
from fastokd.ops import cpp
from fastokd.ops.dispatch import choose
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.resolution import training_size
from fastokd.run.facts import RunFacts, run_path
from fastokd.run.images import load_splits, training_stream
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.teachers import teacher_of, teachers_of
from fastokd.seeds import keyed_generator
from fastokd.student.init import begin_from, read_files
from fastokd.student.teacher import check_held_out


def build(
    recipe: Recipe,
    options: RunOptions,
    *,
    training: bool = True,
    data: DatasetSplits | None = None,
) -> Session:
    """A new session.

    Args:
        training: False for evaluation only, which needs neither teacher nor held-out images.
        data: replaces the recipe's (a benchmark's random images).

    Raises:
        UserError: the recipe or an option isn't possible here; the message names the value.
    """
    _check_fit(recipe, options)
    device = use_device(device_here(options.device))
    precision = pick_precision(options.precision, device)
    set_matmul_precision(precision)
    set_kernel_selection(device, options.deterministic)
    if training and device.type == "cpu":
        keep_freed_memory()
    ranks = Ranks.here(options.parallel, recipe.students, device)

    if data is None:
        begun = options.resume or not training
        kept = first(lambda: RunFacts(run_path(recipe, options)).data()) if begun else {}
        with ranks.one_a_machine_first():
            data = load_splits(recipe, options, begun=begun, kept=kept)
    loaders = sorted({*ranks.gather(data.loader)})
    if len(loaders) > 1:
        raise UserError(f"ranks decode with {' and '.join(loaders)}: choose one --loader for all")
    data = data.to(device)
    min_batch = _min_batch(recipe, data, ranks, options.sync_bn) if training else 1
    stream = training_stream(recipe, options, data, ranks, min_batch)

    _check_impl(options.impl, device, quiet=options.quiet or not training)
    torch.manual_seed(recipe.seed)
    teachers = teachers_of(recipe, options, data, ranks) if training else ()
    teacher, taught_NC = teacher_of(recipe, options, data, teachers, device)
    cohort, method = _cohort_and_method(recipe, options, data, teacher)
    if method.needs.training_set:
        _check_memory(recipe, options, ranks)
        method.start(data.train.labels_N, keyed_generator(recipe.seed, "training set"))
    contents: dict[str, Any] = {}
    if teachers:
        hashes = [fingerprint(one.state) for one in teachers]
        contents["teacher_sha256"] = hashes[0] if len(hashes) == 1 else hashes
    notes: tuple[str, ...] = ()
    if training:
        notes, begun_from = _begin_from(recipe, options, data, cohort)
        contents |= begun_from
        if begun_from and len(options.init) == 1 and recipe.kept_student == 0:
            with torch.no_grad():
                method.begin(cohort)  # what it makes equal stays so
    if training and method.needs.heldout and data.val is None:
        raise UserError(
            f"{recipe.method} measures the students on held-out images, and {recipe.dataset} "
            "has none apart: hold some out, for example with --val 5000"
        )

    if options.checkpoint_activations and training:
        cohort.recompute_activations()
    cohort.to(device)
    method.to(device)
    if options.sync_bn:
        synchronise(cohort, method, ranks)
    student_parallel = None
    if training and ranks.students.size > 1:
        student_parallel = StudentParallel(cohort, method, ranks, precision, recipe.method)
    average = None
    if recipe.averaged:
        average = Average(cohort, recipe.averaged, Averaging.of(recipe), recipe.kept_student)
    learner = Learner(
        cohort,
        method,
        build_optimizers(cohort, method, recipe, device, apex=options.apex),
        device=device,
        precision=precision,
        ranks=ranks,
        student_parallel=student_parallel,
        average=average,
        accumulate=options.accumulate,
        min_batch=min_batch,
        clip_norm=options.clip_norm,
    )
    ranks.seed_global(recipe.seed, 0)
    if training:
        learner.freeze(recipe.frozen_at(0))
    captures, why_not = _captures(options, learner) if training else (False, ())
    learner.adopt(
        Choice.of(options.engine, options.compile, options.memory_format, captures, options.streams)
    )
    settled = (
        options.engine != "auto"
        or options.sync_bn
        or student_parallel is not None
        or options.deterministic
    )
    notes += why_not
    return Session(
        recipe, options, data, stream, learner, settled, teachers, contents, notes, taught_NC
    )


def _captures(options: RunOptions, learner: Learner) -> tuple[bool, tuple[str, ...]]:
    """Whether the steps are captured, and a note why not where a GPU could.

    Raises:
        UserError: capture is asked for, and this learner's step can't be captured.
    """
    why = learner.why_not_captured()
    if options.capture:
        check_captures(learner.device)
        if why is not None:
            raise UserError(f"capture is asked for, but {why}: leave --capture out")
    if options.capture is not None or learner.device.type != "cuda":
        return bool(options.capture), ()
    if options.deterministic:
        why = "--deterministic then holds after a resume, too"
    elif learner.ranks.size > 1:
        why = "several ranks capture only with --capture, which no two GPUs have run yet"
    if why is None:
        return True, ()
    return False, (f"the steps run eagerly, not as a CUDA graph: {why}",)


def _check_fit(recipe: Recipe, options: RunOptions) -> None:
    """Raises UserError for options that don't fit the recipe."""
    if options.accumulate > recipe.batch_size:
        raise UserError(
            f"accumulate is {options.accumulate}, but a batch has {recipe.batch_size} images: "
            "choose at most as many"
        )
    if options.checkpoint_activations and options.sync_bn:
        raise UserError(
            "checkpoint_activations and sync_bn are asked for, but a norm that waits for other ranks "
            "can't be recomputed: leave one of them out"
        )
    if options.teacher and not method_class(recipe.method).needs.teacher:
        raise UserError(
            f"the teacher is {'+'.join(options.teacher)}, but {recipe.method} has none: leave --teacher out"
        )


def _check_memory(recipe: Recipe, options: RunOptions, ranks: Ranks) -> None:
    """Raises UserError where a method can't keep a memory of all training images."""
    if ranks.size > 1:
        raise UserError(
            f"{recipe.method} keeps the embeddings of all training images in a memory, which {ranks.size} "
            "ranks would each renew by their own images only: train on one rank, or without the memory"
        )
    if options.overfit_batch:
        raise UserError(
            f"overfit_batch repeats a batch without its images' numbers, by which {recipe.method} keeps a "
            "memory of them: leave --overfit-batch out, or train without the memory"
        )
    if recipe.repeats > 1 or recipe.balanced:
        raise UserError(
            f"{recipe.method} renews an image's row of its memory once a step, but repeats or balanced shows "
            "an image twice in a batch: set them to 1 and false"
        )


def _check_impl(impl: str, device: torch.device, *, quiet: bool) -> None:
    """Builds the C++ ops before the first step, and raises if ``impl`` isn't available here."""
    if device.type == "cpu" and impl in ("auto", "cpp"):
        if not quiet and speaks() and cpp.load() is not None and cpp.find_compiler() is not None:
            say("building the C++ ops, once on this machine: it takes a few minutes")
        cpp.ensure_built()
    # Each op checks again with its arguments; this check comes before a run folder is made.
    choose("the loss", impl, device, {"cpp": None, "triton": None})


def _min_batch(recipe: Recipe, data: DatasetSplits, ranks: Ranks, sync_bn: bool) -> int:
    """The fewest images that a rank's norms need in each part of an accumulated batch.

    Raises:
        UserError: a student can't take images of this size, or the batch is too small.
    """
    size = ranks.data.size
    least = {recipe.method: method_class(recipe.method).needs.min_batch}
    image_size = data.train.image_size
    if recipe.resized_crop:
        image_size = (training_size(recipe, 0),) * 2  # the smallest
    for name in dict.fromkeys(recipe.models):
        least[name] = least_batch(name, len(data.class_names), recipe.model_options, image_size)
    if sync_bn:  # the norms have the batch of all ranks
        least = {name: -(-count // size) for name, count in least.items()}
    who = max(least, key=lambda name: least[name])
    if recipe.batch_size // size < least[who]:
        each = f", {recipe.batch_size // size} on each of {size} ranks" if size > 1 else ""
        raise UserError(
            f"batch_size is {recipe.batch_size}{each}, but {who} normalises over a batch of at "
            f"least {least[who]}: choose a larger --batch-size"
        )
    return least[who]


def _cohort_and_method(
    recipe: Recipe, options: RunOptions, data: DatasetSplits, teacher: nn.Module | None
) -> tuple[Cohort, Method]:
    return build_cohort(
        recipe,
        len(data.class_names),
        image_size=recipe.train_size or data.train.image_size[0],
        mean=data.mean,
        std=data.std,
        impl=options.impl,
        teacher=teacher,
        class_weight_C=None
        if recipe.class_weights == "none"
        else balanced_weights(data.train.labels_N, data.num_classes),
    )


def _begin_from(
    recipe: Recipe, options: RunOptions, data: DatasetSplits, cohort: Cohort
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Loads ``--init`` into the cohort, unless the run resumes from a checkpoint. Returns notes for
    the user, and the SHA-256 of the weights."""
    where = run_path(recipe, options) / "checkpoints"
    if not options.init or (options.resume and first(lambda: bool(list_checkpoints(where)))):
        return (), {}
    files = read_files(options.init)
    notes = begin_from(cohort, files, data.class_names, recipe.kept_student)
    for weights, _ in files:
        check_held_out(weights, data, "--init", recipe)
    return tuple(notes), {"init_sha256": [fingerprint(weights.state) for weights, _ in files]}
