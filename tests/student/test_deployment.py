"""An export is deployed by what it says: its program, its uint8 form, the table of formats."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from fastokd.data.preprocessing import preprocessing_of
from fastokd.errors import UserError
from fastokd.export import export
from fastokd.export.formats import foreign_name
from fastokd.export.traced import OF_PIXELS
from fastokd.known import list_models
from fastokd.models import create_model
from fastokd.student.convert import convert
from fastokd.student.file import read_weights
from fastokd.student.predict import predict
from fastokd.student.weights import Weights
from tests.student.test_export import EXACT, student_file

PAGE = Path(__file__).parents[2] / "docs/deployment.md"


def photographs(folder: Path) -> list[Path]:
    """Pictures of each kind that is preprocessed differently, larger and smaller than the input."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (61, 83, 4)).astype(np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    rgba.save(folder / "transparent.png")
    rgba.quantize(16).save(folder / "palette.png")
    rgb.convert("L").resize((21, 30)).save(folder / "grey.png")
    rgb.crop((0, 0, 32, 40)).save(folder / "of the input's size.png")
    return sorted(folder.iterdir())


def classified(folder: Path, files: list[Path]) -> tuple[dict[str, Any], str]:
    """What an export's ``classify.py`` defines, and what it prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr("sys.argv", ["classify.py", *map(str, files)])
        defined = runpy.run_path(str(folder / "classify.py"))
    return defined, out.getvalue()


def printed_shares(text: str) -> list[tuple[str, float]]:
    return [
        (name, float(share)) for share, name in re.findall(r"^ +([\d.]+) % {2}(.*)$", text, re.M)
    ]


def assert_printed_lines_run(file: Path, to: str, out: Path, **options: Any) -> Path:
    """The program that `export` names, and the card shows, classifies pictures as `predict` does."""
    done = export(file, to, out, **options)
    command = shlex.split(done.lines[-1].removeprefix("classify a picture with it: "))
    assert command == ["python", str(done.folder / "classify.py"), "picture.jpg"]
    card = (done.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ") == (to == "hub")
    if to == "hub":
        code = card.partition("```python\n")[2].partition("```")[0]
        assert code == (done.folder / "classify.py").read_text()
    files = photographs(out.parent / "photographs")
    defined, text = classified(done.folder, files)
    weights = read_weights(file)
    shown = weights.preprocessing
    for path in files:
        pixels_BHWC = torch.tensor(shown.read(path))[None]
        if options.get("uint8"):
            assert np.abs(defined["preprocess"](path).astype(int) - pixels_BHWC.numpy()).max() <= 1
            continue
        wanted = shown.normalized(pixels_BHWC).numpy()
        # A grey level apart, where a value to round lies halfway.
        close = 1e-5 if not shown.native_size else 1.01 / 255 / min(shown.std)
        np.testing.assert_allclose(defined["preprocess"](path), wanted, rtol=0, atol=close)
    found = printed_shares(text)
    rows = predict(file, files)
    seen = [pair for p in rows for pair in zip(p.classes, p.probabilities, strict=True)]
    assert len(found) == len(seen) == 5 * len(files)
    # Classes that are equally likely may change their places.
    assert [share for _, share in found] == pytest.approx([100 * p for _, p in seen], abs=0.2)
    assert [name for name, _ in found[::5]] == [name for name, _ in seen[::5]]
    return done.folder


VIT = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "class_token": False,
       "global_pool": "avg", "input_size": 32}  # fmt: skip
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "vgg16": (32, {"dropout": 0.25}),
    "timm:vit_tiny_patch16_224": (32, VIT),
    "torchvision:googlenet": (32, {"transform_input": True}),
}


@pytest.mark.parametrize(
    ("model", "to"),
    [
        ("vgg16", "hub"),
        *(("timm:vit_tiny_patch16_224", to) for to in ("safetensors", "timm", "hub")),
        *(("torchvision:googlenet", to) for to in ("safetensors", "torchvision", "hub")),
    ],
)
def test_printed_lines_run(model: str, to: str, tmp_path: Path) -> None:
    """With the model's options, and a path with quotes in it."""
    size, options = OPTIONS[model]
    file = student_file(tmp_path / "student.safetensors", model, size, **options)
    assert_printed_lines_run(file, to, tmp_path / 'it\'s "here"; now')


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("digits", {}),
        ("fashion_mnist", {}),
        ("imagenet", {"image_size": 32, "eval_resize": 37}),
        ("grey", {}),
    ],
)
@pytest.mark.parametrize("uint8", [False, True])
def test_the_program_preprocesses_as_predict_does(
    dataset: str, options: dict[str, int], uint8: bool, tmp_path: Path
) -> None:
    """Small grey sets, resize and crop, and a grey set of any size; for float and for uint8 inputs."""
    shown = preprocessing_of(dataset, **options)
    if dataset == "grey":
        shown = dataclasses.replace(shown, grey=True, background=0)
    file = student_file(tmp_path / "student.safetensors", "resnet8", 32, shown)
    assert_printed_lines_run(file, "torch-export", tmp_path / "out", uint8=uint8)


def test_the_printed_command_runs_without_fastokd(tmp_path: Path) -> None:
    """An ONNX of uint8 images, in another folder, with its own class names and preprocessing."""
    file = student_file(tmp_path / "student.safetensors", "resnet8", 32)
    folder = assert_printed_lines_run(file, "onnx", tmp_path / "it's here", uint8=True)
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved/student.json").unlink()
    code = (tmp_path / "moved/classify.py").read_text()
    assert "fastokd" not in code
    assert "torch" not in code
    picture = photographs(tmp_path / "photographs")[0]
    command = [sys.executable, "classify.py", str(picture)]
    done = subprocess.run(command, cwd=tmp_path / "moved", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (seen,) = predict(file, [picture])
    wanted = [(name, 100 * p) for name, p in zip(seen.classes, seen.probabilities, strict=True)]
    assert [share for _, share in printed_shares(done.stdout)] == pytest.approx(
        [share for _, share in wanted], abs=0.11
    )
    damaged, deep = tmp_path / "damaged.jpg", tmp_path / "deep.png"
    damaged.write_bytes(b"no picture")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    command = [sys.executable, "classify.py", str(damaged), str(deep), str(picture)]
    some = subprocess.run(command, cwd=tmp_path / "moved", capture_output=True, text=True)
    assert (some.returncode, some.stdout) == (2, done.stdout)
    assert [line.split(" can't be read: ")[0] for line in some.stderr.splitlines()] == [
        str(damaged),
        str(deep),
    ]
    bare = subprocess.run(command[:2], cwd=tmp_path / "moved", capture_output=True, text=True)
    assert (bare.returncode, bare.stdout) == (1, "")
    assert bare.stderr.startswith("usage: python classify.py picture.jpg")


@pytest.mark.parametrize("to", [to for to in OF_PIXELS if to in EXACT])
@torch.no_grad()
def test_pixels_are_normalised_inside(to: str, tmp_path: Path) -> None:
    """uint8 [B, H, W, 3], of any number of images, give the student's logits; the file says so."""
    source = student_file(tmp_path / "student.safetensors", "resnet8", 32)
    done = export(source, to, uint8=True)
    assert done.folder == tmp_path / "export" / f"{to}-uint8"
    about = json.loads((done.folder / "student.json").read_text())
    file = done.folder / about["file"]
    weights = read_weights(source)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 7):
        images_BHWC = torch.randint(256, (count, 32, 32, 3), generator=generator).to(torch.uint8)
        wanted_BC = weights.build()(weights.preprocessing.normalized(images_BHWC))
        if to == "onnx":
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            (entry,) = session.get_inputs()
            assert (entry.type, entry.shape) == ("tensor(uint8)", ["batch", 32, 32, 3])
            got_BC = torch.from_numpy(session.run(None, {"images": images_BHWC.numpy()})[0])
        else:
            got_BC = torch.export.load(file).module()(images_BHWC)
        close = 1e-4 * wanted_BC.abs().max().item()
        torch.testing.assert_close(got_BC, wanted_BC, rtol=0, atol=close)
    assert about["preprocessing"]["normalize"] is None
    assert about["preprocessing"]["input"] == {
        "name": "images",
        "dtype": "uint8",
        "layout": "NHWC",
        "shape": ["batch", 32, 32, 3],
    }


@pytest.mark.parametrize(
    ("model", "library", "says"),
    [
        ("resnet20", "torchvision", "resnet20 exists only in fastokd, and not in torchvision"),
        ("timm:resnet10t", "torchvision", "is a network of timm, and not of torchvision"),
        ("torchvision:resnet18", "timm", "export it to torchvision, onnx"),
    ],
)
def test_a_network_that_the_library_lacks_is_said(model: str, library: str, says: str) -> None:
    weights = Weights(Path("student.safetensors"), {}, {"model": model})
    with pytest.raises(UserError, match=says) as error:
        foreign_name(weights, library)
    assert str(error.value).endswith("torch-export, safetensors or hub")


def test_the_table_of_formats() -> None:
    """docs/deployment.md says which students go where."""
    table = {}
    for line in PAGE.read_text().partition("| student | any")[2].splitlines()[2:]:
        if not line.startswith("|"):
            break
        cell, *marks = (part.strip() for part in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", cell):
            table[name] = dict(zip(("any", "torchvision", "timm"), marks, strict=True))
    for name, row in table.items():
        found = {library: has(library, name) for library in ("torchvision", "timm")}
        assert row == {"any": "yes", **{k: "yes" if v else "no" for k, v in found.items()}}, name
    assert sorted(table) == sorted([*list_models(), "torchvision:NAME", "timm:NAME"])


def test_the_ten_lines_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They print the class of `fastokd predict`, of an image folder's student."""
    monkeypatch.chdir(tmp_path)
    Path("runs/pictures").mkdir(parents=True)
    source = student_file(Path("runs/pictures/student.safetensors"), "resnet20", 32)
    export(source, "onnx", uint8=True)
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    for path in photographs(tmp_path / "photographs"):
        if path.name in ("turned.jpg", "grey.png"):
            Path("picture.jpg").write_bytes(path.read_bytes())
            exec(code, {})
            assert capsys.readouterr().out.strip() == predict(source, path)[0].classes[0]


def has(library: str, model: str) -> bool:
    """Whether a student can be exported to that library."""
    try:
        foreign_name(Weights(Path("student.safetensors"), {}, {"model": model}), library)
    except UserError:
        return False
    return True


# The ONNX exporter is slow, and uses only the size of `convert`'s facts.
SLOW = {"onnx": pytest.mark.proof}


@pytest.mark.parametrize("to", [pytest.param(to, marks=SLOW.get(to, ())) for to in EXACT])
def test_what_convert_writes_goes_anywhere(to: str, tmp_path: Path) -> None:
    model = "resnet18" if to in ("torchvision", "timm") else "resnet20"
    torch.save({"state_dict": create_model(model, 100).state_dict()}, tmp_path / "best.pth")
    convert(tmp_path / "best.pth", tmp_path / "ours.safetensors", dataset="cifar100")
    assert_printed_lines_run(tmp_path / "ours.safetensors", to, tmp_path / to)
    if to == "hub":
        card = (tmp_path / to / "README.md").read_text()
        assert "Converted by fastokd from a checkpoint of OKDDip." in card
        Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
        seen = [
            predict(tmp_path / at, [tmp_path / "red.png"]) for at in ("hub", "ours.safetensors")
        ]
        assert seen[0] == seen[1]
