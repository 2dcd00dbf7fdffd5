"""Compares the plan's model of this CPU with measured steps of four recipes, by both programs.

    python -m bench.bench_plan [RECIPE...]

The model is calibrated on matrix products, copies in cache and in memory, and one tiny operator. No
value is fitted to a step.
"""

from __future__ import annotations

import sys

import torch

from fastokd.device import pick_precision
from fastokd.plan.check import HEADER, check
from fastokd.plan.devices import Cpu
from fastokd.recipe.names import recipe

RECIPES = {
    "okddip-branch/resnet32/cifar100": 128,
    "okddip-network/resnet32/cifar100": 128,
    "ffsd/resnet32/cifar100": 128,
    "okddip-network@2/resnet18/imagenet": 16,
}


def main(names: list[str]) -> None:
    cpu = Cpu.calibrated(pick_precision("auto", torch.device("cpu")))
    print(HEADER)
    for name in names or RECIPES:
        for prediction in check(recipe(name, batch_size=RECIPES.get(name, 128)), cpu):
            print(prediction, flush=True)
    print(
        f"modelled and measured-cpu: torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
