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
from fastokd.data.disk.split import DiskDraws, DiskSplit, crops_of, labels_of
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


def _pipeline(split: DiskSplit, source: Iterator[Any], batch: int, threads: int, views: int) -> Any:
    """A pipeline from file names and windows to uint8 ``[B, H, W, 3]`` for each view, and the files' sizes.

    Nothing in it is random: all draws are inputs, so that any batch can be made again. An image is decoded
    once, in the window that holds those of all views.
    """
    fn, pipeline_def, types = _dali()
    on_gpu = split.device.type == "cuda"
    # Each view has a region of interest; where there are several, in a window of its own.
    kinds = [*[types.INT32] * (2 if views > 1 else 0), types.FLOAT, types.FLOAT]

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(split.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=AHEAD,
    )
    def pipeline() -> Any:
        path, start, shape, *of_views = fn.external_source(
            source=source,
            num_outputs=3 + len(kinds) * views,
            dtype=[types.UINT8, types.INT32, types.INT32, *kinds * views],
            ndim=1,
        )
        encoded = fn.io.file.read(path)
        options = {"hw_decoder_load": HARDWARE_LOAD} if on_gpu else {}
        decoded = fn.decoders.image_slice(
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
        seen = []
        for view in range(views):
            first = len(kinds) * view
            *window, roi_start, roi_end = of_views[first : first + len(kinds)]
            images = fn.resize(
                fn.slice(decoded, *window, axis_names="HW") if window else decoded,
                size=[split.view.image_size] * 2,
                # The start of a mirrored image lies right of its end.
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            seen.append(images)
        return *seen, encoded.shape()

    return pipeline()


class _Fed:
    """One batch in progress: DALI decodes its plain images, Pillow the rest."""

    def __init__(self, split: DiskSplit, views: list[DiskDraws]) -> None:
        self.split, self.whole = split, views[0]
        self.views = len(views)
        plain_B = split.plain_N[self.whole.index_B]
        # Positions of both kinds in the batch.
        self.plain_R, self.rest_R = (which.nonzero()[:, 0] for which in (plain_B, ~plain_B))
        self.plain, self.rest = (
            [_rows(draws, rows_R) for draws in views] for rows_R in (self.plain_R, self.rest_R)
        )
        self.seen: list[Future[Tensor]] | None = None

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Starts to decode Pillow's images, once."""
        if self.seen is None:
            pairs = zip(self.rest[0].index_B.tolist(), crops_of(self.rest), strict=True)
            self.seen = [pool.submit(see, self.split, index, crops) for index, crops in pairs]

    def given(self, images_VRHWC: Tensor | None) -> tuple[Tensor, Tensor]:
        """The batch ``[V, B, S, S, 3]``, merged from DALI's images and Pillow's, and its labels."""
        labels_B = labels_of(self.split, self.whole)
        if images_VRHWC is not None and not self.seen:
            return images_VRHWC, labels_B
        device, size = self.split.device, self.split.view.image_size
        shape = (self.views, len(self.whole.index_B), size, size, 3)
        images_VBHWC = torch.empty(shape, dtype=torch.uint8, device=device)
        if images_VRHWC is not None:
            images_VBHWC.index_copy_(1, moved(self.plain_R, device), images_VRHWC)
        if self.seen:
            results = [self._result(row, one) for row, one in enumerate(self.seen)]
            seen_VRHWC = moved(torch.stack(results, dim=1), device)
            images_VBHWC.index_copy_(1, moved(self.rest_R, device), seen_VRHWC)
        return images_VBHWC, labels_B

    def _result(self, row: int, one: Future[Tensor]) -> Tensor:
        try:
            return one.result()
        except Exception as error:
            raise first_broken(self.split, [int(self.rest[0].index_B[row])], error) from None


def _rows(draws: DiskDraws, rows_R: Tensor) -> DiskDraws:
    box_B4 = draws.box_B4
    boxes = None if box_B4 is None else box_B4[rows_R]
    return DiskDraws(draws.index_B[rows_R], boxes, draws.flip_B[rows_R])


def decode(
    split: DiskSplit, drawn: Iterator[list[DiskDraws]], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``drawn``, ``images_VBHWC`` and labels; raises as :meth:`DiskStream.batches`."""
    first = next(drawn, None)
    if first is None:
        return
    V, rest = len(first), drawn
    # Batches in progress, oldest first.
    fed: deque[_Fed] = deque()
    root = os.fsencode(split.root) + b"/"
    # One torch thread each: else every thread of the pool would start its own threads of torch.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def source() -> Iterator[Any]:
        for views in itertools.chain([first], rest):
            fed.append(_Fed(split, views))
            ahead()
            if len(fed[-1].plain_R):
                yield _inputs(split, fed[-1].plain, root)

    def ahead() -> None:
        for one in itertools.islice(fed, AHEAD + 1):
            one.begin(pool)

    def without_dali() -> Iterator[tuple[Tensor, Tensor]]:
        while fed and not len(fed[0].plain_R):
            ahead()
            yield fed.popleft().given(None)

    pipeline = _pipeline(split, source(), batch, workers, V)
    stream = torch.cuda.current_stream(split.device) if split.device.type == "cuda" else None
    failed: RuntimeError | None = None
    watch = Watch(lambda: f"DALI, which reads {_first_of(split, fed)} and what comes after it")
    try:
        while True:
            try:
                with watch:
                    *seen, sizes = pipeline.run(stream)
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
            expected = split.bytes_N[fed[0].plain[0].index_B].numpy()
            if not np.array_equal(sizes.as_array()[:, 0], expected):
                raise first_broken(split, _indices(fed), None)
            images = [torch.from_dlpack(one.as_tensor()) for one in seen]
            yield fed.popleft().given(torch.stack(images) if V > 1 else images[0][None])
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
        for row in range(len(one.plain_R)):
            lone = [_rows(draws, torch.tensor([row])) for draws in one.plain]
            pipeline = _pipeline(split, iter([_inputs(split, lone, root)]), 1, 1, len(lone))
            try:
                pipeline.run()
            except RuntimeError:
                path = split.path(int(lone[0].index_B))
                return DataFileError(
                    f"{path} is damaged in a way that DALI can't decode: write it anew and continue "
                    "with --resume, or train with --loader torchvision"
                )
    return None


def _indices(fed: Iterable[_Fed]) -> Iterator[int]:
    return (index for one in fed for index in one.whole.index_B.tolist())


def _first_of(split: DiskSplit, fed: Iterable[_Fed]) -> str:
    return str(split.path(next(_indices(list(fed)), 0)))


def _inputs(split: DiskSplit, views: list[DiskDraws], root: bytes) -> tuple[Any, ...]:
    """The paths, the windows to decode, and for each view its window within and its region of interest."""
    index_B = views[0].index_B
    windows = [
        centre_windows(split.sizes_N2[index_B], split.view)
        if draws.box_B4 is None
        else windows_of_boxes(draws.box_B4)
        for draws in views
    ]
    start_B2 = np.minimum.reduce([of.start_B2 for of in windows])
    end_B2 = np.maximum.reduce([of.start_B2 + of.shape_B2 for of in windows])
    paths = [np.frombuffer(root + bytes(path), np.uint8) for path in split.paths_N[index_B.numpy()]]
    of_views: list[np.ndarray] = []
    for of, draws in zip(windows, views, strict=True):
        of = mirrored(of._replace(start_B2=of.start_B2 - start_B2), draws.flip_B)
        of_views += of if len(views) > 1 else of[2:]
    return paths, start_B2, end_B2 - start_B2, *of_views
