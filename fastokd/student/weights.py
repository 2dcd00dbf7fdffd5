"""``student.safetensors``: one student's weights and metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastokd.checkpoint import STUDENT as STUDENT
from fastokd.data.preprocessing import FITS, Preprocessing, from_facts
from fastokd.errors import UserError
from fastokd.host.names import in_utf8
from fastokd.models import Student, create_model
from fastokd.recipe.recipe import Recipe
from fastokd.student.torch_file import refuse_what_is_none

# Optional metadata: files of earlier versions lack it.
OPTIONAL = ("step", "ema", "swa", "score")


def _fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _share(value: Any) -> bool:
    """A number of images, or a fraction."""
    return (type(value) is int and value >= 0) or (type(value) is float and 0 < value < 1)


def _score(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.get("split") in ("val", "test")
        and type(value.get("epoch")) is int
        and _fraction(value.get("top1"))
    )


# Files are untrusted: the check that each value must pass.
_FITS: dict[str, Callable[[Any], bool]] = {
    "model_options": lambda value: isinstance(value, dict),
    "class_names": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
    **FITS,
    "step": lambda value: type(value) is int and value >= 0,
    "ema": lambda value: value is None or _fraction(value),
    "swa": lambda value: isinstance(value, bool),
    "score": _score,
    "recipe": lambda value: isinstance(value, dict),
    "val": lambda value: _share(value),
    "test": lambda value: _share(value),
    # Of a teacher (fastokd.student.teacher): classes without names, and how many teachers a run has.
    "num_classes": lambda value: type(value) is int and value >= 2,
    "teachers": lambda value: type(value) is int and 1 <= value <= 64,
}


@dataclass(frozen=True)
class Weights:
    """One student's state and ``facts``, the metadata of its ``student.safetensors``.

    All values except ``model`` are JSON:

    - ``model``, ``model_options``, ``class_names``, the fields of :class:`Preprocessing`;
    - ``student``, its index, and ``role``, why this student was kept;
    - from a run: ``step``; ``ema``, the decay of the average that the weights are, or null; ``swa``,
      true if they are a uniform average; ``score`` of exactly these weights (``split``, ``top1`` from
      0 to 1, ``epoch`` from 1), or null; ``recipe``; ``dataset``; ``val`` and ``test``, what was held out of its training split: a number of images
      or a fraction of each class.
    """

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, str]

    def fact(self, name: str) -> Any:
        """One value of ``facts``, decoded and checked."""
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
        """The model's name."""
        if "model" not in self.facts:
            raise UserError(f"{self.path} doesn't say its model: take a run's {STUDENT}")
        return self.facts["model"]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model's constructor."""
        return dict(self.fact("model_options")) if "model_options" in self.facts else {}

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are preprocessed for the student."""
        return from_facts(self.facts, self.fact)

    def about(self) -> dict[str, Any]:
        """The metadata as a JSON object, without the preprocessing and the recipe."""
        known = ["student", "role", *(name for name in OPTIONAL if name in self.facts)]
        return {
            "model": self.model,
            "model_options": self.options,
            "class_names": self.fact("class_names"),
            **{name: self.fact(name) for name in known},
        }

    def to_bytes(self) -> bytes:
        """A ``student.safetensors``; equal weights and facts give equal bytes."""
        plain = {key: value.detach().cpu().contiguous() for key, value in self.state.items()}
        data = save(plain)  # the metadata is added below: safetensors doesn't fix its order
        size = int.from_bytes(data[:8], "little")
        entries = {
            "__metadata__": dict(sorted(self.facts.items())),
            **json.loads(data[8 : 8 + size]),
        }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    def build(self, class_count: int | None = None) -> Student:
        """The network with these weights, in eval mode. The keys may be fastokd's or the publisher's.

        ``class_count``: of weights without class names.

        Raises:
            UserError: the weights don't fit the model.
        """
        count = class_count or len(self.fact("class_names"))
        model = create_model(self.model, count, **self.options)
        ours = {model.published_key(key): key for key in model.state_dict()}
        try:
            model.load_state_dict({ours.get(key, key): v for key, v in self.state.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{self.path} is no {self.model}: {first}") from error
        return model.eval()


def from_file(path: Path) -> Weights:
    """Reads a ``student.safetensors``; raises UserError if it can't be read."""
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


def student_facts(recipe: Recipe, names: Any, shown: Preprocessing, student: int) -> dict[str, str]:
    """The facts of a run's student; ``names`` are the class names."""
    return {
        "model": recipe.models[student],
        "model_options": json.dumps(recipe.model_options),
        "class_names": json.dumps(list(names)),
        **shown.to_facts(),
        "student": json.dumps(student),
        "role": json.dumps(_role(recipe, student)),
        "dataset": json.dumps(recipe.dataset),
        "val": json.dumps(recipe.val),
        "test": json.dumps(recipe.test),
    }


def _role(recipe: Recipe, student: int) -> str:
    """Why this student was kept, in words."""
    S = recipe.students
    if recipe.companion_of(student) is not None:
        if recipe.companion == "one":
            return f"the hybrid of {recipe.method}'s {S} students"
        return f"the mean over the steps of peer {student} of {recipe.method}"
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
