"""Batches decoded by NVIDIA DALI: one pipeline, on the CPU or, decoding included, on a GPU."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.data.disk.image import first_broken, see
from fastokd.data.disk.split import DiskDraws, DiskSplit, labels_of
from fastokd.data.views import centre_windows, mirrored, windows_of_boxes
from fastokd.data.waits import Watch
from fastokd.device import moved
from fastokd.errors import DataFileError

# Batches that are decoded ahead.
AHEAD = 2
# Share of the JPEGs that a GPU's hardware decoder takes; its cores decode the rest.
HARDWARE_LOAD = 0.75


def why_not() -> str | None:
    """Why DALI isn't available; None if it is."""
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
    """DALI's operators, pipeline decorator and types; untyped, as its stubs are incomplete."""
    from nvidia.dali import fn, pipeline_def, types

    return fn, pipeline_def, types


def _pipeline(split: DiskSplit, source: Iterator[Any], batch: int, threads: int) -> Any:
    """A pipeline from file names and windows to uint8 ``[B, H, W, 3]`` and the files' sizes.

    Nothing in it is random: all draws are inputs, so that any batch can be made again.
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
            # Pillow decodes rotated, transparent and rare images.
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **options,
        )
        images = fn.resize(
            images,
            size=[split.view.image_size] * 2,
            # The start of a mirrored image lies right of its end.
            roi_start=roi_start,
            roi_end=roi_end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return images, encoded.shape()

    return pipeline()


class _Fed:
    """One batch in progress: DALI decodes its plain images, Pillow the rest."""

    def __init__(self, split: DiskSplit, draws: DiskDraws) -> None:
        self.split, self.whole = split, draws
        plain_B = split.plain_N[draws.index_B]
        # Positions of both kinds in the batch.
        self.plain_R, self.rest_R = (which.nonzero()[:, 0] for which in (plain_B, ~plain_B))
        self.plain, self.rest = _rows(draws, self.plain_R), _rows(draws, self.rest_R)
        self.seen: list[Future[Tensor]] | None = None

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Starts to decode Pillow's images, once."""
        if self.seen is not None:
            return
        self.seen = []
        rest = self.rest
        for row, index in enumerate(rest.index_B.tolist()):
            box = None if rest.box_B4 is None else rest.box_B4[row].tolist()
            flip = bool(rest.flip_B[row])
            self.seen.append(pool.submit(see, self.split, index, box, flip=flip))

    def given(self, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """The batch, merged from DALI's images and Pillow's."""
        labels_B = labels_of(self.split, self.whole)
        if images is not None and not self.seen:
            return images, labels_B
        device, size = self.split.device, self.split.view.image_size
        B = len(self.whole.index_B)
        images_BHWC = torch.empty(B, size, size, 3, dtype=torch.uint8, device=device)
        if images is not None:
            images_BHWC.index_copy_(0, moved(self.plain_R, device), images)
        if self.seen:
            seen = torch.stack([self._result(row, one) for row, one in enumerate(self.seen)])
            images_BHWC.index_copy_(0, moved(self.rest_R, device), moved(seen, device))
        return images_BHWC, labels_B

    def _result(self, row: int, one: Future[Tensor]) -> Tensor:
        try:
            return one.result()
        except Exception as error:
            raise first_broken(self.split, [int(self.rest.index_B[row])], error) from None


def _rows(draws: DiskDraws, rows_R: Tensor) -> DiskDraws:
    box_B4 = draws.box_B4
    boxes = None if box_B4 is None else box_B4[rows_R]
    return DiskDraws(draws.index_B[rows_R], boxes, draws.flip_B[rows_R])


def decode(
    split: DiskSplit, drawn: Iterator[DiskDraws], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``drawn``; raises as :meth:`DiskStream.batches`."""
    # Batches in progress, oldest first.
    fed: deque[_Fed] = deque()
    root = os.fsencode(split.root) + b"/"
    # One torch thread each: else every thread of the pool would start its own threads of torch.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def source() -> Iterator[Any]:
        for draws in drawn:
            fed.append(_Fed(split, draws))
            ahead()
            if len(fed[-1].plain.index_B):
                yield _inputs(split, fed[-1].plain, root)

    def ahead() -> None:
        for one in itertools.islice(fed, AHEAD + 1):
            one.begin(pool)

    def without_dali() -> Iterator[tuple[Tensor, Tensor]]:
        while fed and not len(fed[0].plain.index_B):
            ahead()
            yield fed.popleft().given(None)

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
            yield from without_dali()
            if failed is not None:
                found = first_broken(split, _indices(fed), failed)
                raise (_undecodable(split, fed, root) or failed) if found is failed else found
            ahead()
            # A truncated file may still decode where only its beginning is needed.
            expected = split.bytes_N[fed[0].plain.index_B].numpy()
            if not np.array_equal(sizes.as_array()[:, 0], expected):
                raise first_broken(split, _indices(fed), None)
            yield fed.popleft().given(torch.from_dlpack(images.as_tensor()))
        yield from without_dali()
    finally:
        watch.end()
        # End its threads here. If a forked process collected the pipeline, it would wait forever for
        # threads that it doesn't have.
        del pipeline
        pool.shutdown(cancel_futures=True)


def _undecodable(split: DiskSplit, fed: Iterable[_Fed], root: bytes) -> Exception | None:
    """The error for the first file that DALI can't decode but Pillow can, with which `prepare` checks."""
    for one in fed:
        for row in range(len(one.plain.index_B)):
            lone = _rows(one.plain, torch.tensor([row]))
            pipeline = _pipeline(split, iter([_inputs(split, lone, root)]), 1, 1)
            try:
                pipeline.run()
            except RuntimeError:
                path = split.path(int(lone.index_B))
                return DataFileError(
                    f"{path} is damaged in a way that DALI can't decode: write it anew and continue "
                    "with --resume, or train with --loader torchvision"
                )
    return None


def _indices(fed: Iterable[_Fed]) -> Iterator[int]:
    return (index for one in fed for index in one.whole.index_B.tolist())


def _first_of(split: DiskSplit, fed: Iterable[_Fed]) -> str:
    return str(split.path(next(_indices(list(fed)), 0)))


def _inputs(split: DiskSplit, draws: DiskDraws, root: bytes) -> tuple[Any, ...]:
    if draws.box_B4 is None:
        windows = centre_windows(split.sizes_N2[draws.index_B], split.view)
    else:
        windows = windows_of_boxes(draws.box_B4)
    paths = [
        np.frombuffer(root + bytes(path), np.uint8) for path in split.paths_N[draws.index_B.numpy()]
    ]
    return paths, *mirrored(windows, draws.flip_B)
