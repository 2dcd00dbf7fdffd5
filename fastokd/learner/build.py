"""A cohort, its method and their optimizers, from a recipe. They need neither data nor a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastokd.cohort import Cohort
from fastokd.learner.optimizers import create_optimizer
from fastokd.methods import Method, OptimGroup, create_method, method_class
from fastokd.recipe.recipe import Recipe


def build_cohort(
    recipe: Recipe,
    num_classes: int,
    *,
    image_size: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    impl: str = "auto",
    teacher: nn.Module | None = None,
) -> tuple[Cohort, Method]:
    """The cohort and the method, with weights that the recipe's seed decides.

    Args:
        image_size, mean, std: of the images; ``impl``: of the ops; ``teacher``: as
            :class:`~fastokd.Cohort` takes it.

    Raises:
        UserError: the method refuses these students.
    """
    needs = method_class(recipe.method).needs
    cohort = Cohort(
        recipe.models,
        num_classes,
        sharing=recipe.sharing,
        impl=impl,
        mean=mean,
        std=std,
        seed=recipe.seed,
        teacher=teacher,
        trunk_grad_scale=1 / recipe.students if needs.divide_trunk_gradient else 1.0,
        model_options=recipe.model_options,
        image_size=image_size,
        trunk_views=recipe.trunk_views,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + 999_983)
        method = create_method(recipe.method, cohort.shape, impl=impl, **recipe.method_options)
    return cohort, method


def build_optimizers(
    cohort: Cohort, method: Method, recipe: Recipe, sgd: str, device: torch.device
) -> list[torch.optim.Optimizer]:
    """One optimizer for each kind that the method's groups name; rates are device tensors.

    ``sgd``: which SGD, as :func:`create_optimizer` names it.
    """
    groups = [OptimGroup(list(cohort.parameters())), *method.optim_groups()]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        # Parameters that another rank trains don't require gradients here.
        trained = [parameter for parameter in group.parameters if parameter.requires_grad]
        if not trained:
            continue
        lr = recipe.lr if group.lr is None else group.lr
        decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
        by_kind.setdefault(group.optimizer, []).append(
            {
                "params": trained,
                "lr": torch.tensor(lr, device=device),
                "weight_decay": decay,
                "initial_lr": lr,
                "scheduled": group.scheduled,
                "warm_up": group.warm_up,
            }
        )
    return [
        create_optimizer(sgd if kind == "sgd" else kind, groups, recipe)
        for kind, groups in by_kind.items()
    ]
