"""A cohort, its method and their optimizers, from a recipe. They need neither data nor a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.cohort.keys import split_key
from fastokd.learner.label_loss import label_loss_of
from fastokd.learner.optimizers import check_apex, create_optimizer
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
    class_weight_C: Tensor | None = None,
) -> tuple[Cohort, Method]:
    """The cohort and the method, with weights that the recipe's seed decides.

    Args:
        image_size, mean, std: of the images; ``impl``: of the ops; ``teacher``: as
            :class:`~fastokd.Cohort` takes it; ``class_weight_C``: as
            :func:`~fastokd.learner.label_loss.label_loss_of` takes it.

    Raises:
        UserError: the method refuses these students, or settings don't fit the number of classes.
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
        method = create_method(
            recipe.method,
            cohort.shape,
            impl=impl,
            label_loss=label_loss_of(recipe, num_classes, class_weight_C),
            **recipe.method_options,
        )
        with torch.no_grad():
            method.begin(cohort)
    return cohort, method


def build_optimizers(
    cohort: Cohort, method: Method, recipe: Recipe, device: torch.device, *, apex: bool = False
) -> list[torch.optim.Optimizer]:
    """One optimizer for each kind that the method's groups name; rates are device tensors.

    ``apex``: NVIDIA apex's SGD for the recipe's.

    Raises:
        UserError: apex's can't be had, or can't do what the recipe says.
    """
    if apex:
        check_apex(recipe)
    groups = [OptimGroup(list(cohort.parameters())), *method.optim_groups()]
    apart = Apart(cohort, method, recipe)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        kind = group.optimizer or ("apex-sgd" if apex else recipe.optimizer)
        for parameters, lr, decay in apart(group):
            settings: dict[str, Any] = {
                "params": parameters,
                "lr": torch.tensor(lr, device=device),
                "weight_decay": decay,
                "initial_lr": lr,
                "scheduled": group.scheduled,
                "warm_up": group.warm_up,
            }
            if kind == "lamb":
                settings["units"] = [apart.unit(parameter) for parameter in parameters]
            by_kind.setdefault(kind, []).append(settings)
    return [create_optimizer(kind, groups, recipe) for kind, groups in by_kind.items()]


class Apart:
    """Divides a group where the recipe has another rate for heads, no decay for norms, or frozen stages.

    Frozen parameters are groups of their own: the parameters of a group are trained from one step on.
    """

    def __init__(self, cohort: Cohort, method: Method, recipe: Recipe) -> None:
        self.recipe = recipe
        parts = cohort.parts()
        self.heads = {p for part in parts if recipe.head_lr for p in part.head_parameters()}
        stages = recipe.frozen_stages
        self.frozen = {p for part in parts if stages for p in part.body_parameters(stages)}
        # Who is clipped alone: a student by its number, the trunk, or what no one student owns.
        self.units = {p: split_key(name)[0] for name, p in cohort.named_parameters()}
        self.units |= {p: method.belongs_to(name) for name, p in method.named_parameters()}

    def unit(self, parameter: nn.Parameter) -> int:
        """The number of the student whose parameter it is, -1 for a trunk's and those of all."""
        unit = self.units[parameter]
        return -1 if unit is None else unit

    def __call__(self, group: OptimGroup) -> Iterator[tuple[list[nn.Parameter], float, float]]:
        """The parts of a group, each with its rate and its decay."""
        recipe = self.recipe
        lr = recipe.lr if group.lr is None else group.lr
        decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
        spared = not recipe.decay_norms and group.weight_decay is None
        parts: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        # Parameters that another rank trains don't require gradients here.
        for p in (p for p in group.parameters if p.requires_grad):
            kind = (p in self.frozen, p in self.heads, spared and p.dim() <= 1)
            parts.setdefault(kind, []).append(p)
        for (_, is_head, is_spared), parameters in parts.items():
            yield parameters, recipe.head_lr if is_head else lr, 0.0 if is_spared else decay
