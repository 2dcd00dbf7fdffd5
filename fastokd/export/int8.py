"""An ONNX file in int8, by ONNX Runtime's static quantisation, and the images that calibrate it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastokd.checkpoint import write_durably
from fastokd.data import DatasetSplits, stream_of
from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import DISK, UserError, in_one_line
from fastokd.export.contract import metadata
from fastokd.export.source import Source
from fastokd.host.names import counted
from fastokd.seeds import keyed_generator
from fastokd.student.pictures import find_pictures

# Images for the ranges of the activations, by default.
CALIBRATION_IMAGES = 256
BATCH = 32


class Calibration(NamedTuple):
    """uint8 images ``[N, H, W, 3]``, and what they are in words."""

    images_NHWC: Tensor
    what: str

    def facts(self) -> dict[str, Any]:
        """``calibration`` of a card."""
        return {"images": len(self.images_NHWC), "what": self.what}


def calibration(
    source: Source,
    shown: Preprocessing,
    pictures: Sequence[str | os.PathLike[str]],
    count: int | None,
) -> Calibration:
    """``count`` images, drawn by the run's seed and preprocessed as in evaluation: ``pictures`` if any
    are named, otherwise training images.

    Raises:
        UserError: neither is there, ``count`` is below 1, or an image can't be read.
    """
    count = CALIBRATION_IMAGES if count is None else count
    if count < 1:
        raise UserError(f"calibration_images is {count}: it must be at least 1")
    if pictures:
        return _of_pictures(find_pictures(pictures), shown, source.seed, count)
    if source.data is None:
        raise UserError(
            "an export to onnx-int8 is calibrated with training images, and a file outside of a run "
            "doesn't say where they are: add --calibrate with a folder of typical pictures"
        )
    return _of_training(source.data, source.seed, count)


def _of_training(data: DatasetSplits, seed: int, count: int) -> Calibration:
    count = min(count, len(data.train))
    batches = []
    for images_BHWC, _ in stream_of(data.train, min(BATCH, count), seed=seed, shuffle=True).batches(
        0
    ):
        batches.append(images_BHWC.cpu())
        if BATCH * len(batches) >= count:
            break
    what = f"{counted(count, 'training image')} of {data.name}, drawn by seed {seed}"
    return Calibration(torch.cat(batches)[:count], what)


def _of_pictures(files: list[Path], shown: Preprocessing, seed: int, count: int) -> Calibration:
    order = torch.randperm(len(files), generator=keyed_generator(seed, "calibration")).tolist()
    images = np.stack([shown.read(files[index]) for index in order[:count]])
    what = f"{len(images):,} of {counted(len(files), 'picture')}, drawn by seed {seed}"
    return Calibration(torch.from_numpy(images), what)


class _Batches:
    """What ONNX Runtime reads its calibration from."""

    def __init__(self, inputs_N: Tensor) -> None:
        self.rest = iter(inputs_N.split(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return None if batch is None else {"images": batch.numpy()}


def quantise(source: Path, file: Path, inputs_N: Tensor, about: dict[str, Any]) -> None:
    """Writes the float32 ONNX ``source`` as int8, in QDQ form, to ``file``.

    Weights have a scale per output channel, activations one each, from their range over ``inputs_N``.
    Weights are limited to 7 bits: the sum of two products of 8 bits saturates the 16 bits of AVX2 and
    AVX-512 without VNNI, so that the accuracy would depend on the CPU.

    Raises:
        UserError: ONNX Runtime can't quantise this graph.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        with TemporaryDirectory() as work:
            prepared = Path(work) / "prepared.onnx"
            quant_pre_process(source, prepared)
            # A norm that no layer absorbs has no weights per output channel.
            norms = [
                node.name
                for node in onnx.load(prepared).graph.node
                if node.op_type.endswith("Normalization")
            ]
            quantization.quantize_static(
                prepared,
                file,
                _Batches(inputs_N),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=norms,
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise UserError(
            f"ONNX Runtime can't quantise {about['model']} ({in_one_line(error)}): export it to onnx"
        ) from error
    model = onnx.load(file)
    onnx.helper.set_model_props(model, metadata(about))
    write_durably(file, model.SerializeToString(deterministic=True))
