"""Augmentation of training images: its settings, its draws on the host, its batched tensor operations."""

from fastokd.data.augment.operations import operate
from fastokd.data.augment.rows import batch_rows, draw_rows
from fastokd.data.augment.settings import Augment

__all__ = ["Augment", "batch_rows", "draw_rows", "operate"]
