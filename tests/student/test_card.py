"""The card of an export, and int8: what they say is counted and measured again here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from fastokd.cli import run_command
from fastokd.data import DatasetSplits, Split, load_dataset
from fastokd.data.preprocessing import preprocessing_of
from fastokd.export import Export, card, export, int8
from fastokd.export.accuracy import accuracy
from fastokd.export.latency import BATCHES
from fastokd.export.measured import sentences
from fastokd.export.source import source_of
from fastokd.models import model_info
from fastokd.recipe.names import recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights
from fastokd.train import train
from tests.student.test_deployment import classified, printed_shares
from tests.student.test_export import student_file

SHORT = RunOptions(max_steps=12, quiet=True, engine="loop", precision="fp32", device="cpu")
PROGRAMS = [("torch, eager", None), ("torch.compile", None), ("ONNX Runtime", "onnx")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("card") / "run"
    return train(recipe("baseline/resnet8/digits", batch_size=50), SHORT, out=out)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the float32 form of the int8 export is kept."""
    return tmp_path_factory.mktemp("float32") / "resnet8.onnx"


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("no working compiler\nand more lines")


@pytest.fixture(scope="module")
def int8_export(run: Run, float32: Path) -> Export:
    """Measured where the compiler fails."""
    quantise = int8.quantise

    def keeping(source: Path, *others: Any) -> None:
        shutil.copy(source, float32)
        quantise(source, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantise", keeping)
        patch.setattr(torch, "compile", failing)
        return export(run, "onnx-int8", measure=True, calibration_images=64, options=SHORT)


def said(done: Export) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done.folder / "card.json").read_text())
    return found


def logits(file: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    return np.asarray(found)


def apart(run: Run, file: Path, *, pixels: bool = False) -> float:
    """The RMS difference of a file's logits from the student's over the test set, as a share of the
    RMS logit."""
    images_BHWC, weights = load_dataset("digits").test.images_NHWC, read_weights(run.folder)
    images_BCHW = weights.preprocessing.normalized(images_BHWC)
    with torch.no_grad():
        wanted_BC = weights.build()(images_BCHW).numpy()
    got_BC = logits(file, images_BHWC if pixels else images_BCHW)
    return float(np.sqrt(np.square(got_BC - wanted_BC).mean() / np.square(wanted_BC).mean()))


def test_the_accuracy_is_that_of_the_file(int8_export: Export, run: Run) -> None:
    test = load_dataset("digits").test
    images = read_weights(run.folder).preprocessing.normalized(test.images_NHWC)
    chosen_N = logits(int8_export.folder / "resnet8-int8.onnx", images).argmax(1)
    right_N, labels_N = chosen_N == test.labels_N.numpy(), test.labels_N.numpy()
    found = said(int8_export)["accuracy"]
    ours = found["formats"]["onnx-int8"]
    assert found["images"] == len(labels_N)
    assert found["images_by_class"] == np.bincount(labels_N).tolist()
    assert ours["top1"] == pytest.approx(right_N.mean(), abs=1e-12)
    by_class = [right_N[labels_N == c].mean() for c in range(10)]
    assert ours["by_class"] == pytest.approx(by_class, abs=1e-12)
    assert found["formats"]["onnx"]["top1"] == pytest.approx(run.last["test"]["student_top1"][0])
    with torch.no_grad():
        own_N = read_weights(run.folder).build()(images).argmax(1).numpy()
    assert found["agreement"] == pytest.approx((own_N == chosen_N).mean(), abs=2e-3)


def test_it_is_int8_within_and_near_the_student(int8_export: Export, run: Run) -> None:
    file = int8_export.folder / "resnet8-int8.onnx"
    graph = onnx.load(file).graph
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    kernels = [x for x in weights.values() if x.ndim == 4]
    assert len(kernels) == 9
    assert all(x.dtype == np.int8 and np.abs(x.astype(int)).max() <= 64 for x in kernels)
    scales = [x for name, x in weights.items() if name.endswith("weight_scale")]
    assert sorted({len(x) for x in scales if x.ndim == 1}) == [10, 16, 32, 64]
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert apart(run, file) < 0.1


def test_costs_are_counted(int8_export: Export, run: Run) -> None:
    found, info = said(int8_export), model_info("resnet8", 10)
    assert (found["parameters"], found["macs"]) == (info.params, info.macs)
    sizes = found["bytes"]
    assert sizes["onnx-int8"] == (int8_export.folder / "resnet8-int8.onnx").stat().st_size
    assert sizes["safetensors"] == pytest.approx(4 * info.params, rel=0.1)
    assert sizes["onnx"] > 2.5 * sizes["onnx-int8"]
    assert found["recipe"] == run.recipe.to_json()
    about = json.loads((int8_export.folder / "student.json").read_text())
    assert about.items() <= {**found, "recipe": run.recipe.name}.items()


def test_latency_is_measured_or_says_why_not(int8_export: Export) -> None:
    found = said(int8_export)["latency"]
    assert found["threads"] == torch.get_num_threads()
    programs = [*PROGRAMS, ("ONNX Runtime", "onnx-int8")]
    wanted = [(*program, batch) for batch in BATCHES for program in programs]
    assert [(row["program"], row["format"], row["batch"]) for row in found["rows"]] == wanted
    for row in found["rows"]:
        assert (row["how"], row["device"]) == ("measured-cpu", "cpu")
        if row["program"] == "torch.compile":
            assert row["error"] == "RuntimeError: no working compiler"
        else:
            assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"]
            assert row["calls"] >= 10


def test_the_readme_and_the_lines_have_the_cards_figures(int8_export: Export) -> None:
    found, text = said(int8_export), (int8_export.folder / "README.md").read_text()
    for number in (found["parameters"], found["macs"], *found["bytes"].values()):
        assert f" {number:,} |" in text
    formats = found["accuracy"]["formats"]
    for name, of in formats.items():
        for shown in (text, "\n".join(int8_export.lines)):
            assert f"{100 * of['top1']:.2f} % in {name}" in shown
    for c in range(10):
        cells = [f"{100 * of['by_class'][c]:.1f} %" for of in formats.values()]
        assert f"| {c} | {found['accuracy']['images_by_class'][c]} | {' | '.join(cells)} |" in text
    for row in found["latency"]["rows"]:
        assert (f"{row['ms']:.3g} (" if "ms" in row else "no working compiler") in text
    assert "64 training images of digits" in text


def test_the_program_of_an_int8_export_classifies(int8_export: Export, tmp_path: Path) -> None:
    image = load_dataset("digits").test.images_NHWC[7].numpy()
    Image.fromarray(image).save(tmp_path / "seven.png")
    defined, text = classified(int8_export.folder, [tmp_path / "seven.png"])
    images = torch.from_numpy(defined["preprocess"](tmp_path / "seven.png"))
    (logits_C,) = logits(int8_export.folder / "resnet8-int8.onnx", images)
    assert printed_shares(text)[0][0] == str(logits_C.argmax())


def test_calibration_images_are_drawn_by_the_seed(run: Run) -> None:
    source = source_of(run.folder, read_weights(run.folder), SHORT)
    shown, train = preprocessing_of("digits"), load_dataset("digits").train.images_NHWC
    known = {image.numpy().tobytes() for image in train}
    draws = []
    for seed in (0, 0, 1):
        drawn = int8.calibration(source._replace(seed=seed), shown, (), 40).images_NHWC
        draws.append([image.numpy().tobytes() for image in drawn])
        assert len(draws[-1]) == 40
        assert set(draws[-1]) <= known
    assert draws[0] == draws[1] != draws[2]
    assert len(int8.calibration(source, shown, (), 10**6).images_NHWC) == len(train)


def test_a_wrong_calibration_shows(
    int8_export: Export, run: Run, float32: Path, tmp_path: Path
) -> None:
    """The range over black images is too small for any other. The same images give the same bytes."""
    about = json.loads((int8_export.folder / "student.json").read_text())
    shown, train = preprocessing_of("digits"), load_dataset("digits").train.images_NHWC[:64]
    files = [tmp_path / name for name in ("a.onnx", "b.onnx", "black.onnx")]
    for file, images in zip(files, (train, train, torch.zeros_like(train)), strict=True):
        int8.quantise(float32, file, shown.normalized(images), about)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert apart(run, files[0]) < 0.1
    assert apart(run, files[2]) > 0.3


def test_pictures_calibrate_outside_of_a_run(run: Run, tmp_path: Path) -> None:
    """A network that takes uint8 images."""
    source = tmp_path / "student.safetensors"
    source.write_bytes((run.folder / "student.safetensors").read_bytes())
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(load_dataset("digits").train.images_NHWC[:60].numpy()):
        Image.fromarray(image).save(tmp_path / f"pictures/{index}.png")
    command = [
        "export",
        str(source),
        "--to",
        "onnx-int8",
        "--uint8",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--calibrate", str(tmp_path / "pictures"), "--calibration-images", "50"]
    assert run_command(command) == 0
    found = json.loads((tmp_path / "out/card.json").read_text())
    assert found["calibration"] == {"images": 50, "what": "50 of 60 pictures, drawn by seed 0"}
    assert (found["accuracy"], found["latency"]) == (None, None)
    assert apart(run, tmp_path / "out/resnet8-int8.onnx", pixels=True) < 0.1


def test_an_accuracy_that_int8_costs_is_warned_of(
    int8_export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(int8_export) | {"latency": None}
    found["accuracy"]["formats"]["onnx"]["top1"] = found["accuracy"]["formats"]["onnx-int8"]["top1"]
    assert len(sentences(found)) == 2
    assert capsys.readouterr().err == ""
    found["accuracy"]["formats"]["onnx"]["top1"] += 0.02
    sentences(found)
    assert "int8 loses 2.0 points of test top-1: calibrate it with" in capsys.readouterr().err
    found["accuracy"] = None
    assert "its accuracy isn't measured" in sentences(found)[1]


def test_of_many_classes_the_worst_are_shown(tmp_path: Path) -> None:
    """And a class without images has no accuracy."""
    C, drawn = 120, torch.Generator().manual_seed(0)
    labels_N = torch.arange(1, C).repeat_interleave(2)
    images_NHWC = torch.randint(256, (len(labels_N), 32, 32, 3), generator=drawn).to(torch.uint8)
    split, shown = Split(images_NHWC, labels_N), preprocessing_of("imagefolder")
    names = tuple(f"class_{c}" for c in range(C))
    data = DatasetSplits("made", names, shown, split, None, split)
    # Right on each class's first image; of the classes from 100 on, on both.
    right_N = torch.arange(len(labels_N)) % 2 == 0
    answers_N = torch.where(right_N | (labels_N >= 100), labels_N, 0)
    given = iter(torch.nn.functional.one_hot(answers_N, C).split(256))
    found = accuracy({"onnx": lambda images: next(given)}, data, pixels=False)
    assert found["formats"]["onnx"]["by_class"] == [None] + [0.5] * 99 + [1.0] * 20
    assert found["formats"]["onnx"]["top1"] == pytest.approx((99 + 40) / 238)
    weights = read_weights(student_file(tmp_path / "student.safetensors", "resnet8", 32, shown))
    done = export(weights.path, "safetensors")
    facts = said(done) | {"accuracy": found, "class_names": names}
    rows = re.findall(
        r"^\| class\\_(\d+) \| 2 \| 50.0 % \|$", card.markdown(weights, facts, ""), re.M
    )
    assert len(rows) == 20
    assert max(map(int, rows)) < 100


@pytest.mark.proof
@pytest.mark.parametrize("works", [True, False])
def test_a_compiled_student_is_timed(works: bool, run: Run, tmp_path: Path) -> None:
    """Or the compiler that is missing is named."""
    from torch._inductor import config

    changes: dict[str, Any] = {"force_disable_caches": True}
    changes |= {} if works else {"cpp.cxx": ("no-such-compiler",)}
    with config.patch(changes):
        found = said(export(run, "safetensors", tmp_path / "out", measure=True, options=SHORT))
    for row in found["latency"]["rows"]:
        if works or row["program"] != "torch.compile":
            assert row["ms"] > 0
        else:
            assert "no-such-compiler" in row["error"]
    assert (
        found["accuracy"]["formats"]["safetensors"]["top1"] == run.last["test"]["student_top1"][0]
    )
    assert found["bytes"]["onnx"] > 0
