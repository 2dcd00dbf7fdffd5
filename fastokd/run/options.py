"""The options of a run: where and how a recipe runs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastokd.errors import UserError, as_path, wrong_type
from fastokd.known import LOADERS

# Options that determine a run's numbers, or their last bits: a resumed run keeps them, and the
# contents of `init` and of the teacher (identity.py).
KEPT = (
    *("device", "precision", "engine", "compile", "memory_format", "capture", "streams"),
    *("impl", "loader"),
    *("apex", "accumulate", "clip_norm", "overfit_batch", "sync_bn", "deterministic"),
    *("init", "eval_every"),
)
# The values that leave the choice to the machine or to a measurement.
LEFT_OPEN = {
    **{"device": "auto", "engine": "auto", "compile": None},
    **{"memory_format": "auto", "capture": None, "streams": None},
    **{"impl": "auto", "loader": "auto"},
}
# Options that tuning decides, each a field of Choice.
TUNED = ("engine", "compile", "memory_format", "capture", "streams")
LEAST = {
    **dict.fromkeys(("max_steps", "eval_every", "accumulate", "save_every_steps"), 1),
    **dict.fromkeys(("workers", "skip_nonfinite"), 0),
}
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")


@dataclass(frozen=True)
class RunOptions:
    """Where and how a recipe runs. The command line has an option for each field.

    Raises:
        UserError: a value of another type, a number out of its range, or an unknown word.
    """

    out: Annotated[Path | None, "The run folder; by default runs/RECIPE-seedN."] = None
    data_root: Annotated[
        Path | None, "The folder that holds the data sets; a run that was begun knows its own."
    ] = None
    download: Annotated[bool, "Download the data set if it is missing."] = False
    resume: Annotated[
        bool,
        "Continue the run in --out, or in the folder that is named instead of the recipe, with the "
        "options it began with.",
    ] = False
    device: Annotated[str, "auto (the GPU, if there is one), cpu, cuda or cuda:1."] = "auto"
    precision: Annotated[
        str,
        "auto (bf16 if the device has bf16 instructions, otherwise fp32), bf16, fp16 (with an "
        "adaptive loss scale), tf32 (GPUs) or fp32.",
    ] = "auto"
    teacher: Annotated[
        tuple[str, ...],
        "The teacher of kd and okddip_kd: a run, a checkpoint, a student.safetensors, or "
        "torchvision:NAME=FILE or timm:NAME=FILE (without =FILE the weights in the library's cache); "
        "several are averaged; by default the run folder of the recipe that trains it.",
    ] = ()
    init: Annotated[
        tuple[str, ...],
        "Trained weights to start from: a run, a checkpoint, a student.safetensors or a state dict "
        "(.pth); one file for all students, or one per student.",
    ] = ()
    engine: Annotated[
        str,
        "How the students run: loop, grouped, vmap, or auto, which measures them if the run is long.",
    ] = "auto"
    impl: Annotated[str, "Implementation of the ops: auto, torch, cpp or triton."] = "auto"
    apex: Annotated[bool, "Use NVIDIA apex's FusedSGD for the optimizer sgd."] = False
    compile: Annotated[
        bool | None, "Use torch.compile for forward and loss; by default --engine auto decides."
    ] = None
    memory_format: Annotated[
        str, "Layout of weights and maps: auto, channels_last or contiguous."
    ] = "auto"
    capture: Annotated[
        bool | None,
        "Run the whole step as a CUDA graph; by default on one GPU, if the step can be captured.",
    ] = None
    streams: Annotated[
        bool | None,
        "Run the loop's students of a captured step on parallel streams; by default --engine auto "
        "decides.",
    ] = None
    accumulate: Annotated[
        int,
        "Split each batch into N parts and sum their gradients; only BatchNorm sees the parts.",
    ] = 1
    checkpoint_activations: Annotated[
        bool,
        "Recompute the activations of each stage in the backward pass: less memory, a second forward, "
        "the same numbers.",
    ] = False
    clip_norm: Annotated[float | None, "Clip the gradient's norm to this value."] = None
    skip_nonfinite: Annotated[
        int, "Steps with a non-finite value to skip before the run stops."
    ] = 0
    loader: Annotated[
        str,
        "Loader of images on disk: dali, nvjpeg, torchvision, or auto (dali if installed, otherwise "
        "nvjpeg on a GPU, otherwise torchvision).",
    ] = "auto"
    workers: Annotated[int, "Threads or processes of the loader; 0: one per core."] = 0
    eval_every: Annotated[
        int, "Epochs between evaluations; the last epoch is always evaluated."
    ] = 1
    save_every_steps: Annotated[
        int | None, "Steps between checkpoints, in addition to one per epoch."
    ] = None
    save_every_minutes: Annotated[
        float | None, "Minutes between checkpoints, in addition to one per epoch."
    ] = 15.0
    max_steps: Annotated[int | None, "Stop a run after this many steps in total."] = None
    overfit_batch: Annotated[bool, "Train on one batch only, to check that a set-up can learn."] = (
        False
    )
    parallel: Annotated[
        str,
        "What torchrun's ranks divide: data (each batch), or students (further ranks divide the "
        "batch).",
    ] = "data"
    sync_bn: Annotated[bool, "Compute BatchNorm's statistics over the batch of all ranks."] = False
    deterministic: Annotated[
        bool,
        "Bitwise the same results on the same machine, on a GPU too; slower there, and no engine is "
        "chosen by timing.",
    ] = False
    show_augmentation: Annotated[
        bool, "Write the first batch as the students see it to augmentation.png."
    ] = False
    tensorboard: Annotated[bool, "Log every epoch to TensorBoard, in the run folder."] = False
    wandb: Annotated[bool, "Log every epoch to Weights & Biases."] = False
    quiet: Annotated[bool, "Print only errors."] = False

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}")
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            raise UserError(f"save_every_minutes is {self.save_every_minutes}: it must be above 0")
        # A run on a set in memory records the loader "memory".
        choices = {"loader": (*LOADERS, "memory"), "memory_format": MEMORY_FORMATS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                said = ", ".join(word for word in known if word != "memory")
                raise UserError(f"{name} is {getattr(self, name)!r}: choose {said}")
        if self.sync_bn and self.engine not in ("auto", "loop"):
            raise UserError(
                f"engine is {self.engine!r}, but sync_bn runs the students one after another: leave "
                "one of them out"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UserError(f"clip_norm is {self.clip_norm}: it must be a finite number above 0")

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values; ``RunOptions(**values)`` is the inverse."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def differing(self, begun: Mapping[str, Any], unsaid: Mapping[str, Any]) -> list[str]:
        """The options that differ from those of a begun run, each with both values.

        ``unsaid``: for each option the value that requests nothing. Options that ``begun`` lacks (runs
        of older versions) or that tuning hasn't decided yet don't differ.
        """
        begun = {**begun, "init": tuple(begun.get("init", ()))}
        return [
            f"--{name.replace('_', '-')} ({_said(begun[name])} there, {_said(getattr(self, name))} here)"
            for name in KEPT
            if name in begun
            and not _is_open(name, begun[name])
            and not (name in unsaid and getattr(self, name) == unsaid[name])
            and getattr(self, name) != begun[name]
            and not (name == "device" and str(begun[name]).startswith(f"{self.device}:"))
        ]

    def as_begun(self, begun: Mapping[str, Any], where: Path) -> RunOptions:
        """The options for resuming the run with the options ``begun``, which replace defaults.

        Raises:
            UserError: a requested option differs; the message has both values.
        """
        known = {name: begun[name] for name in KEPT if name in begun}
        known = {name: value for name, value in known.items() if not _is_open(name, value)}
        known["init"] = tuple(begun.get("init", ()))
        differing = self.differing(begun, {name: getattr(RunOptions(), name) for name in KEPT})
        if differing:
            raise UserError(
                f"the run in {where} was started differently: it differs in {', '.join(differing)}; "
                "leave that out to resume it as it was, or choose another --out"
            )
        try:
            return replace(self, **known)
        except (TypeError, UserError) as error:
            raise UserError(
                f"the run in {where} doesn't say how it was begun ({error}): its environment.json is "
                "damaged, remove it to resume with the options given"
            ) from error


# The type of each field without None, and whether None may be given.
_KINDS = {
    name: (
        next(kind for kind in get_args(hint) or (hint,) if kind not in (type(None), ...))
        if get_origin(hint) is not tuple
        else tuple,
        type(None) in get_args(hint),
    )
    for name, hint in get_type_hints(RunOptions).items()
}
_SAID = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def chosen(options: RunOptions | None, changes: Mapping[str, Any]) -> RunOptions:
    """``options``, by default the usual ones, with single fields replaced by ``changes``.

    Raises:
        UserError: a name that isn't a field; as :class:`RunOptions`.
    """
    if not isinstance(options, (RunOptions, type(None))):
        raise UserError(f"options is {options!r}: give a fastokd.RunOptions, or single keywords")
    for name, value in changes.items():
        if name not in _KINDS:
            near = nearest_option(name)
            setting = "a setting of the recipe is given to fastokd.recipe(name, ...)"
            fix = f"did you mean {near}?" if near else setting
            raise UserError(f"{name}={value!r} is no option of a run: {fix}")
    return replace(options or RunOptions(), **changes)


def nearest_option(name: str) -> str | None:
    """The option whose name is nearest to ``name``, if one is near."""
    return next(iter(difflib.get_close_matches(name, _KINDS, n=1, cutoff=0.7)), None)


def _checked(name: str, value: Any, kind: tuple[Any, bool]) -> Any:
    """``value`` in the type of the option ``name``.

    Raises:
        UserError: it has another type.
    """
    wanted, optional = kind
    if value is None and optional:
        return None
    if wanted is tuple:  # of paths
        if value is None:
            return ()
        if isinstance(value, (str, os.PathLike)):
            value = (value,)
        if not isinstance(value, Sequence):
            raise wrong_type(name, value, "a path or a list of paths")
        return tuple(str(as_path(name, entry)) for entry in value)
    if wanted is Path:
        return as_path(name, value)
    abstract = {int: numbers.Integral, float: numbers.Real}.get(wanted, wanted)
    if not isinstance(value, abstract) or (isinstance(value, bool) and wanted is not bool):
        raise wrong_type(name, value, _SAID[wanted])
    # NumPy's numbers can't be written as JSON.
    return wanted(value) if wanted is int else value


# docs/api.md shows the docstring.
RunOptions.__doc__ = f"{RunOptions.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {name}: {get_args(annotation)[1]}"
    for name, annotation in get_type_hints(RunOptions, include_extras=True).items()
)


def _is_open(name: str, value: Any) -> bool:
    return name in TUNED and value == LEFT_OPEN[name]


def _said(value: Any) -> Any:
    return " ".join(value) or None if isinstance(value, tuple) else value
