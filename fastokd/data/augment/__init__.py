"""Augmentation of training images: its settings, its draws on the host, its batched tensor operations."""

from fastokd.data.augment.operations import operate
from fastokd.data.augment.rows import batch_rows, columns_of, draw_rows
from fastokd.data.augment.settings import Augment

__all__ = ["Augment", "batch_rows", "columns_of", "draw_rows", "operate"]
