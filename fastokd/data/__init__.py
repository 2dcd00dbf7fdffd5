"""Data sets, in memory and on disk, and the batches that a run draws from them."""

from fastokd.data.augment import Augment
from fastokd.data.balance import class_counts
from fastokd.data.disk.split import DiskSplit
from fastokd.data.disk.stream import DiskStream
from fastokd.data.registry import load_dataset
from fastokd.data.sets.stream import BatchStream, Draws
from fastokd.data.splits import DatasetSplits, Split
from fastokd.data.stream import read_all, stream_of
from fastokd.known import list_datasets

__all__ = [
    "Augment",
    "BatchStream",
    "DatasetSplits",
    "DiskSplit",
    "DiskStream",
    "Draws",
    "Split",
    "class_counts",
    "list_datasets",
    "load_dataset",
    "read_all",
    "stream_of",
]
