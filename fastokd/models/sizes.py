"""Which image sizes and batches a student takes, found by forwards on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models.registry import create_model, found_once
from fastokd.models.student import Student

# Heights and widths that an error message names; the first is that of every data set in memory.
USUAL = (32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384, 448, 512)


@found_once
def least_batch(name: str, num_classes: int, options: dict[str, Any], size: tuple[int, int]) -> int:
    """The smallest batch that the student ``name`` trains on: 2 where a norm would get one value a
    channel, else 1.

    Args:
        options: the model's own, as :func:`create_model` takes them.
        size: height and width of the images.

    Raises:
        UserError: it can't take images of that size; the usual sizes that it takes are named.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        student = create_model(name, num_classes, **options)
    if _fault(student, 1, size, training=True) is None:
        return 1
    fault = _fault(student, 2, size, training=False)
    if fault is not None:
        raise UserError(
            f"{name} can't take images of {size[0]}x{size[1]} ({fault}): {_what_fits(student)}"
        )
    # Where neither runs, its training reads values, which meta tensors don't have.
    return 2 if _fault(student, 2, size, training=True) is None else 1


def _fault(student: Student, batch: int, size: tuple[int, int], *, training: bool) -> str | None:
    """What a forward of ``batch`` images raises, or None; an empty map is a fault too."""
    empty: list[str] = []

    def look(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() == 0:
            empty.append(f"{type(module).__name__} gives {list(output.shape)}")

    hooks = [module.register_forward_hook(look) for module in student.modules()]
    student.train(training)
    try:
        with torch.device("meta"), torch.no_grad():
            student(torch.empty(batch, 3, *size))
    except Exception as error:  # raised by the student's own code
        return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    finally:
        for hook in hooks:
            hook.remove()
    return empty[0] if empty else None


def _what_fits(student: Student) -> str:
    """Which of the usual sizes it takes, and what the user can do."""
    fits = [n for n in USUAL if _fault(student, 2, (n, n), training=False) is None]
    if not fits:
        return "choose another student"
    all_above = len(fits) > 1 and tuple(fits) == USUAL[-len(fits) :]
    sizes = f"{fits[0]} and more" if all_above else ", ".join(map(str, fits))
    return f"of the usual sizes it takes {sizes}; choose another student, or --image-size if the data set has a choice"
