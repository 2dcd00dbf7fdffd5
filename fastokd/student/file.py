"""One student as it is kept: its weights, and what it says of itself.

:func:`read_weights` decides which weights are a run's, for whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastokd.checkpoint import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    run_checkpoint,
)
from fastokd.data.preprocessing import FITS, Preprocessing, from_facts, preprocessing_of
from fastokd.errors import UserError, warn
from fastokd.host.names import in_utf8
from fastokd.metrics import MetricLines, Row
from fastokd.models import Student, create_model
from fastokd.recipe.recipe import Recipe
from fastokd.student.torch_file import refuse_what_is_none

STUDENT = "student.safetensors"


def _fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _score(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.get("split") in ("val", "test")
        and type(value.get("epoch")) is int
        and _fraction(value.get("top1"))
    )


# Files come from anywhere: what a fact must be like to be used.
_FITS: dict[str, Callable[[Any], bool]] = {
    "model_options": lambda value: isinstance(value, dict),
    "class_names": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
    **FITS,
    "step": lambda value: type(value) is int and value >= 0,
    "ema": lambda value: value is None or _fraction(value),
    "score": _score,
    "recipe": lambda value: isinstance(value, dict),
    "val": lambda value: type(value) is int and value >= 0,
}
# What older files don't say.
OPTIONAL = ("step", "ema", "score")


@dataclass(frozen=True)
class Weights:
    """One student's state and what it says of itself (the metadata of a ``student.safetensors``).

    ``facts``, each as JSON but the model: ``model``, ``model_options``, ``class_names``, the fields
    of its :class:`Preprocessing`, ``student`` (its index) and ``role`` (why it is this one). Files of a
    run say besides: ``step`` (of the run, after which the weights are these), ``ema`` (the decay,
    where they are a running average; else null), ``score`` (what exactly these weights scored:
    ``split``, ``top1`` from 0 to 1 and ``epoch``, counted from 1; null where they weren't scored)
    ``recipe``, and ``dataset`` and ``val`` (what it was trained on, and how many images were held
    out of that).
    """

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, str]

    def fact(self, name: str) -> Any:
        """One of ``facts``, out of its JSON."""
        if name not in self.facts:
            raise UserError(f"{self.path} doesn't say its {name}: take a run's {STUDENT}")
        try:
            value = json.loads(self.facts[name])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path} is damaged: its {name} can't be read; take a run's {STUDENT}"
            ) from error
        if name in _FITS and not _FITS[name](value):
            raise UserError(
                f"{self.path} is damaged: its {name} is {str(value)[:80]}; take a run's {STUDENT}"
            )
        return value

    @property
    def model(self) -> str:
        """The student's model, by name."""
        if "model" not in self.facts:
            raise UserError(f"{self.path} doesn't say its model: take a run's {STUDENT}")
        return self.facts["model"]

    @property
    def options(self) -> dict[str, Any]:
        """Of the model's constructor."""
        return dict(self.fact("model_options")) if "model_options" in self.facts else {}

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture is shown to the student."""
        return from_facts(self.facts, self.fact)

    def about(self) -> dict[str, Any]:
        """All that it says of itself, for JSON."""
        known = ["student", "role", *(name for name in OPTIONAL if name in self.facts)]
        return {
            "model": self.model,
            "model_options": self.options,
            "class_names": self.fact("class_names"),
            **asdict(self.preprocessing),
            **{name: self.fact(name) for name in known},
        }

    def to_bytes(self) -> bytes:
        """A ``student.safetensors``: the same bytes from the same weights and facts."""
        plain = {key: value.detach().cpu().contiguous() for key, value in self.state.items()}
        data = save(plain)  # whose metadata would stand in the order of a hash map
        size = int.from_bytes(data[:8], "little")
        entries = {
            "__metadata__": dict(sorted(self.facts.items())),
            **json.loads(data[8 : 8 + size]),
        }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    def build(self) -> Student:
        """The network with these weights, in eval mode; their keys ours or the publisher's.

        Raises:
            UserError: the weights don't fit the model that the file names.
        """
        model = create_model(self.model, len(self.fact("class_names")), **self.options)
        ours = {model.published_key(key): key for key in model.state_dict()}
        try:
            model.load_state_dict({ours.get(key, key): v for key, v in self.state.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{self.path} is no {self.model}: {first}") from error
        return model.eval()


def student_of(
    path: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    rows: list[Row],
    student: int | None = None,
) -> Weights:
    """A student out of a run's state, as a checkpoint has it: the one that the recipe keeps, by its
    running average where the run keeps one, or ``student`` as it stands.

    Args:
        rows: the run's ``metrics.jsonl``; a score is told of where the same step was measured.

    Raises:
        UserError: there is no such student, or this is no run's state.
    """
    recipe = Recipe.from_json(facts.get("recipe"))
    if student is None:
        student = recipe.kept_student
    if not 0 <= student < recipe.students:
        raise UserError(
            f"student is {student}: {path} has {recipe.students}, counted from 0, the leader last"
        )
    ema = facts.get("ema") if student == recipe.kept_student else None
    prefixes = ("cohort.trunk.", f"cohort.students.{student}.") if ema is None else ("ema.",)
    state = {
        key.removeprefix(prefix): value
        for prefix in prefixes
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    try:
        shown = preprocessing_of(
            recipe.dataset,
            mean=facts["mean"],
            std=facts["std"],
            image_size=recipe.image_size,
            eval_resize=recipe.eval_resize,
        )
        said = student_facts(recipe, facts["class_names"], shown, student)
        score = _measured(rows, facts["step"], None if ema is not None else student)
        of_run = {"step": facts["step"], "ema": ema, "score": score, "recipe": recipe.to_json()}
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is no run's: it lacks {error}") from error
    return Weights(path, state, said | {name: json.dumps(of_run[name]) for name in of_run})


def student_facts(recipe: Recipe, names: Any, shown: Preprocessing, student: int) -> dict[str, str]:
    """What a student's file says of it; ``names`` are the classes'."""
    return {
        "model": recipe.models[student],
        "model_options": json.dumps(recipe.model_options),
        "class_names": json.dumps(list(names)),
        **shown.to_facts(),
        "student": json.dumps(student),
        "role": json.dumps(_role(recipe, student)),
        "dataset": json.dumps(recipe.dataset),
        "val": json.dumps(recipe.val),
    }


def _measured(rows: list[Row], step: int, student: int | None) -> dict[str, Any] | None:
    """What the weights of one step scored: a student's, or (None) the average's."""
    for row in reversed(rows):
        found = row.get("test") or row.get("val")
        if row.get("step") == step and found:
            top1 = [found.get("ema_top1")] if student is None else found["student_top1"][student:]
            if top1 and top1[0] is not None:
                split = "test" if row.get("test") else "val"
                return {"split": split, "top1": top1[0], "epoch": row["epoch"] + 1}
    return None


def _role(recipe: Recipe, student: int) -> str:
    """Why this student is the one, in words."""
    S = recipe.students
    if S == 1:
        return "the only student"
    if recipe.has_leader:
        which = "the leader" if student == S - 1 else f"peer {student}"
        return f"{which} of {recipe.method}"
    if student != recipe.kept_student:
        return f"student {student} of {S}, asked for"
    if recipe.reported == "kept":
        return f"student {student} of {S}, drawn by the seed: {recipe.method} has no leader"
    return f"the first of {S}: {recipe.method} has no leader, and its students are alike"


def read_weights(path: Path, *, student: int | None = None, best: bool = False) -> Weights:
    """A student from a run folder, a checkpoint or a ``student.safetensors``.

    A run's are those of its newest step: its ``student.safetensors``, or the newest checkpoint that
    is whole where that is of a later step (the run went on and hasn't ended). Where the run keeps an
    average, so it is of the kept student in each of these.

    Args:
        student: which of a run's or a checkpoint's; None for the one that its recipe keeps.
        best: of a run, the best epoch's in place of the last one's.

    Raises:
        UserError: there is none, or it can't be read.
    """
    if path.is_file():
        if student is not None or best:
            raise UserError(f"{path} is one student, of one epoch: name its run to choose another")
        return _from_file(path)
    if best:
        found = list_checkpoints(path / "checkpoints", "best")
        if not found:
            raise UserError(f"{path} has no best checkpoint: leave --best out")
        return _from_checkpoint(found[0], *load_checkpoint(found[0]), student)
    if (path / STUDENT).is_file():
        written = _from_file(path / STUDENT)
        if student in (None, written.facts.get("student") and written.fact("student")):
            return _newer(path, written)
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return _from_checkpoint(*run_checkpoint(path), student)
    raise UserError(f"{path} is no run, checkpoint or {STUDENT}: name one of them")


def _newer(run: Path, written: Weights) -> Weights:
    """The run's ``student.safetensors``, or the same student of a checkpoint of a later step."""
    step = written.fact("step") if "step" in written.facts else -1
    saved = list_checkpoints(run / "checkpoints")
    if not saved or checkpoint_step(saved[0]) <= step:
        return written
    try:
        path, tensors, facts, faults = newest_checkpoint(run / "checkpoints")
    except UserError as error:
        warn(f"{error} ({STUDENT} is used)")
        return written
    if checkpoint_step(path) <= step:
        return written
    if step < 0 and ("recipe" not in facts or (faults and _finished(run, facts))):
        return written  # an older file doesn't say its step, but the run's end wrote it
    if step >= 0:
        warn(f"{written.path} is of step {step}, and the run went on: {path.name} is used")
    return _from_checkpoint(path, tensors, facts, None)


def _finished(run: Path, facts: dict[str, Any]) -> bool:
    """Whether the run's last epoch was measured."""
    rows = run_rows(run)
    return bool(rows) and rows[-1]["epoch"] + 1 == Recipe.from_json(facts.get("recipe")).epochs


def run_rows(run: Path) -> list[Row]:
    """A run's ``metrics.jsonl``; nothing where it is damaged, which is warned of."""
    try:
        return MetricLines(run / "metrics.jsonl").read()
    except UserError as error:
        warn(f"{error} (no score is told of)")
        return []


def _from_file(path: Path) -> Weights:
    try:
        with in_utf8(path.parent) as folder, safe_open(folder / path.name, "pt") as file:
            names = list(file.keys())
            return Weights(
                path, {name: file.get_tensor(name) for name in names}, file.metadata() or {}
            )
    except (OSError, SafetensorError) as error:
        refuse_what_is_none(path)
        raise UserError(
            f"{path} can't be read as a {STUDENT}: {error}; an author's .pth is turned into one "
            "by `fastokd convert`"
        ) from error


def _from_checkpoint(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], student: int | None
) -> Weights:
    return student_of(path, tensors, facts, run_rows(path.parent.parent), student)
