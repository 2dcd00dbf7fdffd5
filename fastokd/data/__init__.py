"""Data sets, in memory and on disk, and the batches that a run draws from them."""

from fastokd.data.disk.split import DiskSplit, DiskStream
from fastokd.data.registry import load_dataset
from fastokd.data.splits import DatasetSplits, Split
from fastokd.data.stream import Augment, BatchStream, Draws
from fastokd.known import list_datasets

__all__ = [
    "Augment",
    "BatchStream",
    "DatasetSplits",
    "DiskSplit",
    "DiskStream",
    "Draws",
    "Split",
    "list_datasets",
    "load_dataset",
]
