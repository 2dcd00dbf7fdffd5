"""A run's parts, built from a recipe: data, cohort, method, optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.data import (
    BatchStream,
    DatasetSplits,
    DiskSplit,
    DiskStream,
    Split,
    load_dataset,
)
from fastokd.distributed.ranks import Line
from fastokd.learner.optimizers import create_optimizer
from fastokd.methods import Method, OptimGroup, create_method, method_class
from fastokd.ops.fused_bn_act import norm_impl
from fastokd.recipe.names import Recipe
from fastokd.run.options import RunOptions
from fastokd.student.teacher import Weights, build_teacher

EVAL_BATCH = 512


def load_splits(
    recipe: Recipe, options: RunOptions, device: torch.device, *, begun: bool = False
) -> DatasetSplits:
    """The recipe's data on the device; ``begun`` as for :func:`fastokd.data.load_dataset`."""
    data = load_dataset(
        recipe.dataset,
        options.data_root,
        val=recipe.val,
        download=options.download,
        image_size=recipe.image_size,
        eval_resize=recipe.eval_resize,
        streamed=recipe.resized_crop,
        loader=options.loader,
        workers=options.workers,
        begun=begun,
    )
    return data.to(device)


def build_cohort(
    recipe: Recipe, data: DatasetSplits, options: RunOptions, teacher: Weights | None = None
) -> tuple[Cohort, Method]:
    """The cohort and the method, on the CPU, with weights that the seed decides."""
    needs = method_class(recipe.method).needs
    frozen: nn.Module | None = None
    if teacher is not None:
        with torch.random.fork_rng(devices=[]):
            frozen = build_teacher(teacher, data)
    cohort = Cohort(
        recipe.models,
        len(data.class_names),
        sharing=recipe.sharing,
        impl=norm_impl(options.impl),
        mean=data.mean,
        std=data.std,
        seed=recipe.seed,
        teacher=frozen,
        trunk_grad_scale=1 / recipe.students if needs.divide_trunk_gradient else 1.0,
        model_options=recipe.model_options,
        image_size=data.train.image_size[0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + 999_983)
        method = create_method(
            recipe.method, cohort.shape, impl=options.impl, **recipe.method_options
        )
    return cohort, method


def build_optimizers(
    cohort: Cohort, method: Method, recipe: Recipe, options: RunOptions, device: torch.device
) -> list[torch.optim.Optimizer]:
    """One optimizer for each kind that is asked for; rates are device tensors."""
    groups = [OptimGroup(list(cohort.parameters())), *method.optim_groups()]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        # What another rank trains asks for no gradient here.
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
        create_optimizer(options.optimizer if kind == "sgd" else kind, groups, recipe)
        for kind, groups in by_kind.items()
    ]


class RepeatedBatch:
    """The first batch of a stream, as often as the stream has batches (``--overfit-batch``)."""

    def __init__(self, stream: BatchStream | DiskStream) -> None:
        self.count = len(stream)
        self.only = stream.batch(0, 0)

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same images and labels, whatever the epoch."""
        del epoch
        for _ in range(start_batch, self.count):
            yield self.only


def evaluation_stream(
    split: Split | DiskSplit, line: Line | None = None
) -> BatchStream | DiskStream:
    """Every image once, in order, as it is; over all ranks of ``line`` where there are several."""
    line = line or Line()
    size = min(EVAL_BATCH * line.size, len(split))
    return split.stream(size, rank=line.rank, world_size=line.size)
