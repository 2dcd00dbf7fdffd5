"""Counts the GPU kernels and the bytes of one captured step, for docs/performance.md.

    python -m bench.counted_steps [--norms torch] [--write]

The step is traced on fake tensors in the recipe's shapes (``fastokd/plan/trace.py``). What a run adds to
it (the batch's crop and flip, a method's draws, the metrics) is counted in one real step of
``train_epoch`` on four drawn images; images of 224x224 come from a loader, so their crops aren't counted.
``--write`` replaces the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.benchmark.synthetic import drawn_batch, drawn_splits
from fastokd.ops import cpp
from fastokd.plan.ops import Op, describe
from fastokd.plan.roofline import launches
from fastokd.plan.trace import trace_ours, use_torchs_layers
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.hooks import Hook, Hooks
from fastokd.run.options import RunOptions
from fastokd.train import train_epoch

RECIPES = {
    "branch ResNet-32": ("okddip-branch@4/resnet32/cifar100", 128),
    "network ResNet-32": ("okddip-network@4/resnet32/cifar100", 128),
    "FFSD ResNet-32": ("ffsd/resnet32/cifar100", 128),
    "network ResNet-34, 224x224": ("okddip-network@4/resnet34/imagenet", 256),
    "branch ResNet-18, 224x224": ("okddip-branch@4/resnet18/imagenet", 256),
}
PARTS = ("products", "norms", "casts", "other maps", "losses", "update")
HEADS = ("recipe", "kernels", *PARTS, "batch, draws, metrics", "GB")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
REGION = re.compile(r"(<!-- counted: now -->\n).*?(<!-- end -->)", re.DOTALL)


class Count(TorchDispatchMode, Hook):
    """Counts kernels; ``ends``: their number at the end of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.ends = 0, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = describe(func, args, kwargs or {}, out, "", "")
        self.kernels += 0 if op is None else op.launches
        return out

    def on_step(self, images: int) -> None:
        self.ends.append(self.kernels)


def part_of(op: Op) -> str:
    """The column of an operator in the table."""
    if op.kind == "optimizer":
        return "update"
    if op.kind == "loss":
        return "losses"
    if op.name in ("_to_copy", "_foreach_copy_"):
        return "casts"
    if op.kind == "norm" or op.name == "add_":  # the count of batches
        return "norms"
    return "products" if op.kind == "product" else "other maps"


def whole_step(of: Recipe, norms: str) -> int:
    """Kernels of one step of a run, from the batch to the metrics."""
    four = dataclasses.replace(
        of, batch_size=4, image_size=min(of.image_size, 64), resized_crop=False
    )
    data = drawn_splits(four, drawn_batch(dataclasses.replace(four, batch_size=12)))
    session = build(four, RunOptions(engine="loop", precision="bf16", quiet=True), data=data)
    use_torchs_layers(session.learner.cohort, session.learner.method, norms)
    hooks, count = Hooks(), Count()
    hooks.add(count)
    with count:
        train_epoch(session, hooks)
    _, second, third = count.ends  # the first makes what later steps use again
    return third - second


def row(name: str, of: Recipe, norms: str) -> list[str]:
    """One line of the table."""
    ops = trace_ours(of, of.batch_size, "loop", "bf16", norms).ops
    parts: Counter[str] = Counter()
    for op in ops:
        parts[part_of(op)] += op.launches
    around = whole_step(of, norms) - launches(ops)
    counts = [launches(ops) + around, *(parts[part] for part in PARTS), around]
    return [name, *(f"{n:,}" for n in counts), f"{sum(op.bytes for op in ops) / 1e9:.3g}"]


def table(norms: str) -> str:
    """The table of all recipes."""
    cpp.ensure_built()  # without it norms and losses are counted as PyTorch's operators
    rows = [list(HEADS), ["---"] * len(HEADS)]
    rows += [row(k, recipe(of, batch_size=B), norms) for k, (of, B) in RECIPES.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--norms", default="auto", help="torch: PyTorch's norms")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    asked = parser.parse_args(arguments)
    made = table(asked.norms)
    print(made, end="")
    if asked.write:
        PAGE.write_text(REGION.sub(lambda m: f"{m[1]}{made}{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
