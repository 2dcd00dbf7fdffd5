"""The images of a run: its splits, and the stream of its training batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from fastokd.data import Augment, DatasetSplits, load_dataset, stream_of
from fastokd.data.augment.kinds import with_kinds
from fastokd.data.order import epoch_length
from fastokd.data.reduced import reduced
from fastokd.device import pick_device
from fastokd.distributed.launch import device_here
from fastokd.distributed.ranks import Ranks
from fastokd.models.pretrained import normalisation_of
from fastokd.recipe.augmentation import OPERATIONS
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.resolution import training_size
from fastokd.run.options import RunOptions
from fastokd.run.session import Stream


def load_splits(
    recipe: Recipe,
    options: RunOptions,
    *,
    begun: bool = False,
    kept: Mapping[str, Any] | None = None,
) -> DatasetSplits:
    """The recipe's data, normalised as it says; ``begun`` and ``kept`` as for
    :func:`fastokd.data.load_dataset`."""
    data = load_dataset(
        recipe.dataset,
        options.data_root,
        val=recipe.val,
        test=recipe.test,
        download=options.download,
        image_size=recipe.image_size,
        eval_resize=recipe.eval_resize,
        streamed=recipe.resized_crop,
        loader=options.loader,
        workers=options.workers,
        begun=begun,
        device=pick_device(device_here(options.device)),
        kept=kept,
    )
    data = reduced(data, fraction=recipe.fraction, label_noise=recipe.label_noise, seed=recipe.seed)
    if recipe.normalise_by == "data":
        return data
    mean, std = normalisation_of(recipe.models)
    shown = replace(data.preprocessing, mean=mean, std=std)
    return replace(data, preprocessing=shown, with_held_out=None)


def training_stream(
    recipe: Recipe, options: RunOptions, data: DatasetSplits, ranks: Ranks, min_batch: int
) -> Stream:
    """This rank's training batches, without a last batch that is too small for the norms."""
    rest = epoch_length(len(data.train), recipe.repeats) % recipe.batch_size
    stream = stream_of(
        data.train,
        recipe.batch_size,
        seed=recipe.seed,
        augment=augment_of(recipe, data.mean),
        shuffle=True,
        drop_last=0 < rest // ranks.data.size < min_batch,
        repeats=recipe.repeats,
        balanced=recipe.balanced,
        images_per_class=recipe.images_per_class,
        rank=ranks.data.rank,
        world_size=ranks.data.size,
        size=partial(training_size, recipe) if recipe.resized_crop else None,
        views=_views(recipe, ranks),
    )
    return RepeatedBatch(stream) if options.overfit_batch else stream


def _views(recipe: Recipe, ranks: Ranks) -> tuple[int, ...] | None:
    """The views that this rank's networks read: its students' by their numbers, and behind those of all
    students a teacher's. None where all networks read one."""
    count = recipe.number_of_views
    if count is None:
        return None
    return (*ranks.share(recipe.students), *range(recipe.students, count))


def augment_of(recipe: Recipe, mean: tuple[float, ...]) -> Augment:
    """The recipe's augmentation of images with this ``mean``, which fills what is empty."""
    crops = recipe.crop_padding, recipe.crop_mode, recipe.flip, recipe.resized_crop
    operations = {name: getattr(recipe, name) for name in OPERATIONS}
    fill = tuple(round(255 * channel) for channel in mean)
    augment = Augment(*crops, **operations, fill=fill)
    if not recipe.view_kinds:
        return augment
    return with_kinds(augment, recipe.view_kinds.split("+"), recipe.image_size)


class RepeatedBatch:
    """Repeats the first batch of a stream (``--overfit-batch``); the number of batches stays."""

    def __init__(self, stream: Stream) -> None:
        self.count = len(stream)
        self.only = next(iter(stream.batches(0)))

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same images and labels in every epoch."""
        del epoch
        for _ in range(start_batch, self.count):
            yield self.only
