"""Batches decoded by NVIDIA DALI: one pipeline, on the CPU or, decoding included, on a GPU."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.data.broken import first_broken
from fastokd.data.disk import DiskBatch, DiskSplit, labels_of
from fastokd.data.views import centre_windows, mirrored, windows_of_boxes
from fastokd.data.waits import Watch
from fastokd.errors import DataFileError

# Batches that are decoded ahead.
AHEAD = 2
# Of a GPU's JPEGs, the share that its hardware decoder takes; the rest is decoded by its cores.
HARDWARE_LOAD = 0.75


def why_not() -> str | None:
    """Why DALI can't serve here; None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"{error}; install fastokd[dali-cuda12] or fastokd[dali-cuda13]"
    return None


def version() -> str:
    """DALI's version."""
    import nvidia.dali

    return str(nvidia.dali.__version__)


def _dali() -> tuple[Any, Any, Any]:
    """Operators, the pipeline's decorator and constants; untyped, as their stubs lack half."""
    from nvidia.dali import fn, pipeline_def, types

    return fn, pipeline_def, types


def _pipeline(split: DiskSplit, source: Iterator[Any], batch: int, threads: int) -> Any:
    """File names and windows in; uint8 ``[B, H, W, 3]`` and the files' sizes out.

    Nothing in it is random: what is drawn comes in, so that any batch can be made again.
    """
    fn, pipeline_def, types = _dali()
    on_gpu = split.device.type == "cuda"

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(split.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=AHEAD,
    )
    def pipeline() -> Any:
        path, start, shape, roi_start, roi_end = fn.external_source(
            source=source,
            num_outputs=5,
            dtype=[types.UINT8, *[types.INT32] * 2, *[types.FLOAT] * 2],
            ndim=1,
        )
        encoded = fn.io.file.read(path)
        options = {"hw_decoder_load": HARDWARE_LOAD} if on_gpu else {}
        images = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            # As torchvision: a photograph isn't turned by its camera's note.
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **options,
        )
        images = fn.resize(
            images,
            size=[split.view.image_size] * 2,
            # Of an image to be mirrored, the start lies right of the end.
            roi_start=roi_start,
            roi_end=roi_end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return images, encoded.shape()

    return pipeline()


def decode(
    split: DiskSplit, plans: Iterator[DiskBatch], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``plans``; raises as :meth:`DiskStream.batches`."""
    # Of what the pipeline was fed and hasn't given back yet, oldest first.
    fed: deque[DiskBatch] = deque()
    root = os.fsencode(split.root) + b"/"

    def source() -> Iterator[Any]:
        for plan in plans:
            fed.append(plan)
            if len(plan.index_B):
                yield _inputs(split, plan, root)

    pipeline = _pipeline(split, source(), batch, workers)
    stream = torch.cuda.current_stream(split.device) if split.device.type == "cuda" else None
    failed: RuntimeError | None = None
    watch = Watch(lambda: f"DALI, which reads {_first_of(split, fed)} and what comes after it")
    try:
        while True:
            try:
                with watch:
                    images, sizes = pipeline.run(stream)
            except StopIteration:
                break
            except RuntimeError as error:
                # Its traceback would keep the pipeline alive.
                failed = error.with_traceback(None)
            if failed is not None:
                found = first_broken(split, _indices(fed), failed)
                raise (_undecodable(split, fed, root) or failed) if found is failed else found
            while not len(fed[0].index_B):
                yield _empty(split, fed.popleft())
            plan = fed[0]
            # A part of a file may decode well though its end is gone.
            if not np.array_equal(sizes.as_array()[:, 0], split.bytes_N[plan.index_B].numpy()):
                raise first_broken(split, _indices(fed), None)
            fed.popleft()
            yield torch.from_dlpack(images.as_tensor()), labels_of(split, plan)
        yield from (_empty(split, plan) for plan in fed)
    finally:
        watch.end()
        # Its threads end here and not when garbage is collected, which may be in a forked process:
        # that has none of them and would wait for ever.
        del pipeline


def _undecodable(split: DiskSplit, fed: Iterable[DiskBatch], root: bytes) -> Exception | None:
    """The first file that DALI alone can't decode: Pillow, which `prepare` looks with, is milder."""
    for plan in fed:
        for row in range(len(plan.index_B)):
            one = slice(row, row + 1)
            box_14 = None if plan.box_B4 is None else plan.box_B4[one]
            lone = DiskBatch(plan.index_B[one], box_14, plan.flip_B[one])
            pipeline = _pipeline(split, iter([_inputs(split, lone, root)]), 1, 1)
            try:
                pipeline.run()
            except RuntimeError:
                path = split.path(int(plan.index_B[row]))
                return DataFileError(
                    f"{path} is damaged in a way that DALI can't decode: write it anew and continue "
                    "with --resume, or train with --loader torchvision"
                )
    return None


def _first_of(split: DiskSplit, fed: deque[DiskBatch]) -> str:
    return str(split.path(next(_indices(list(fed)), 0)))


def _indices(fed: Iterable[DiskBatch]) -> Iterator[int]:
    return (index for plan in fed for index in plan.index_B.tolist())


def _inputs(split: DiskSplit, plan: DiskBatch, root: bytes) -> tuple[Any, ...]:
    if plan.box_B4 is None:
        windows = centre_windows(split.sizes_N2[plan.index_B], split.view)
    else:
        windows = windows_of_boxes(plan.box_B4)
    paths = [
        np.frombuffer(root + bytes(path), np.uint8) for path in split.paths_N[plan.index_B.numpy()]
    ]
    return paths, *mirrored(windows, plan.flip_B)


def _empty(split: DiskSplit, plan: DiskBatch) -> tuple[Tensor, Tensor]:
    """A rank's share of a last batch that is smaller than the ranks are many."""
    size = split.view.image_size
    images_BHWC = torch.empty(0, size, size, 3, dtype=torch.uint8, device=split.device)
    return images_BHWC, labels_of(split, plan)
