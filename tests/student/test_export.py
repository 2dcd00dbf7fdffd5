"""Every export is loaded by its library and gives the student's logits."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import fastokd
from fastokd.cli import run_command
from fastokd.data import load_dataset
from fastokd.data.preprocessing import Preprocessing, preprocessing_of
from fastokd.errors import UserError
from fastokd.export import FORMATS, Export, checked, export
from fastokd.export.formats import call
from fastokd.models import create_model
from fastokd.recipe.names import recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights
from fastokd.student.predict import Prediction, predict
from fastokd.train import train

# Those whose logits are the student's own.
EXACT = [name for name, form in FORMATS.items() if not form.int8]
SHORT = RunOptions(max_steps=2, quiet=True, engine="loop", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("export") / "run"
    return train(recipe("baseline/resnet18/digits", batch_size=8), SHORT, out=out)


@pytest.fixture(scope="module")
def resnet8(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("export") / "run"
    return train(recipe("okddip-branch@3/resnet8/digits"), SHORT, out=out)


@pytest.fixture(scope="module", name="images_BCHW")
def fixture_images() -> torch.Tensor:
    digits = load_dataset("digits")
    assert digits.val is not None
    normal = (digits.val.images_NHWC[:5].float() / 255 - digits.mean[0]) / digits.std[0]
    return normal.permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module", params=EXACT)
def exported(
    request: pytest.FixtureRequest, resnet18: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Export]:
    """A format, and resnet18 in it. A Run is taken as its folder is."""
    to = request.param
    return to, export(resnet18, to, tmp_path_factory.mktemp("exported") / to)


def test_each_format_gives_the_students_logits(
    exported: tuple[str, Export], resnet18: Run, images_BCHW: torch.Tensor
) -> None:
    """Loaded without our code; on five images, where the export was traced with two."""
    to, done = exported
    about = json.loads((done.folder / "student.json").read_text())
    file = done.folder / about["file"]
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["preprocessing"]["input"]["shape"] == ["batch", 3, 32, 32]
    with torch.no_grad():
        wanted = read_weights(resnet18.folder).build()(images_BCHW)
        if to == "onnx":
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            got = torch.from_numpy(session.run(["logits"], {"images": images_BCHW.numpy()})[0])
        elif to == "torch-export":
            got = torch.export.load(file).module()(images_BCHW)
        else:
            if to == "torchvision":
                net = torchvision.models.resnet18(num_classes=10)
                net.load_state_dict(torch.load(file, weights_only=True))
            elif to == "timm":
                net = timm.create_model("resnet18", num_classes=10, checkpoint_path=str(file))
            elif to == "hub":
                net = timm.create_model(f"local-dir:{done.folder}", pretrained=True)
                card = (done.folder / "README.md").read_text()
                assert "library_name: timm" in card
                assert "one network" in card
                assert "teach each other" not in card
            else:
                net = torchvision.models.resnet18(num_classes=10)
                net.load_state_dict(load_file(file))
            got = net.eval()(images_BCHW)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_the_student_that_is_taken_is_named_and_why(resnet8: Run, tmp_path: Path) -> None:
    assert "the leader of okddip" in export(resnet8.folder, "safetensors").lines[0]
    peer = export(resnet8.folder, "hub", tmp_path / "peer", student=1)
    assert "peer 1 of okddip" in peer.lines[0]
    card = (peer.folder / "README.md").read_text()
    assert "peer 1 of okddip" in card
    assert "teach each other" in card
    top1 = resnet8.last["test"]["student_top1"]
    assert f"{100 * top1[1]:.2f} % (measured by the run)" in card
    kept = json.loads((peer.folder / "student.json").read_text())
    assert kept["student"] == 1


def test_an_export_that_was_killed_is_in_nobodys_way(resnet8: Run, tmp_path: Path) -> None:
    left = tmp_path / f".again.tmp{os.getpid()}"
    left.mkdir()
    (left / "resnet8.safetensors").write_bytes(b"half")
    export(resnet8.folder, "safetensors", tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_an_export_with_other_logits_is_not_kept(
    factor: float, resnet8: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS["torch-export"]
    wrong = form._replace(read=lambda weights, path: lambda x: form.read(weights, path)(x) * factor)
    monkeypatch.setitem(FORMATS, "torch-export", wrong)
    with pytest.raises(UserError, match="gives other logits"):
        export(resnet8.folder, "torch-export", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "coreml"], "unknown format 'coreml'"),
        (["--to", "torchvision"], "resnet8 exists only in fastokd, and not in torchvision"),
        (["--to", "timm"], "resnet8 exists only in fastokd, and not in timm"),
        (["--to", "safetensors", "--uint8"], "choose onnx, onnx-int8 or torch-export"),
        (["--to", "hub", "--student", "3"], "student is 3"),
        (["--to", "hub", "--out", "."], "exists already"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, resnet8: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["export", str(resnet8.folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_sees_a_picture(resnet8: Run, tmp_path: Path) -> None:
    """The preprocessing is that of held-out images: the same pixels give the same probabilities."""
    digits = load_dataset("digits")
    image = digits.test.images_NHWC[7]
    wide = np.zeros((32, 40, 3), np.uint8)  # only the centre square counts
    wide[:, 4:36] = image.numpy()
    Image.fromarray(wide).save(tmp_path / "seven.png")
    (seen,) = predict(resnet8.folder, [tmp_path / "seven.png"], top=3)
    normal = (image.float() / 255 - digits.mean[0]) / digits.std[0]
    with torch.no_grad():
        logits = read_weights(resnet8.folder).build()(normal.permute(2, 0, 1)[None])
    best = logits.softmax(1)[0].topk(3)
    assert seen.classes == tuple(str(index) for index in best.indices.tolist())
    assert seen.probabilities == pytest.approx(best.values.tolist(), abs=1e-6)
    exported = export(resnet8.folder, "hub", tmp_path / "hub").folder
    assert predict(exported, [tmp_path / "seven.png"], top=3) == [seen]


def test_a_centre_crop_is_of_a_larger_picture(resnet8: Run, tmp_path: Path) -> None:
    """As for ImageNet: the shorter side is resized to 40, and its centre of 32 is cropped."""
    file = tmp_path / "student.safetensors"
    weights = read_weights(resnet8.folder)

    def seen(eval_resize: int, name: str) -> Prediction:
        shown = preprocessing_of("imagefolder", eval_resize=eval_resize).to_facts()
        save_file(weights.state, file, {**weights.facts, **shown})
        return predict(file, [tmp_path / name])[0]

    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise[4:36, 4:36]).save(tmp_path / "middle.png")
    whole, middle = seen(40, "noise.png"), seen(0, "middle.png")
    assert whole.probabilities == middle.probabilities


@pytest.mark.parametrize(
    ("image", "message"), [("none.png", "there is no picture"), ("text.png", "can't be read")]
)
def test_what_is_no_picture_is_said(
    image: str, message: str, resnet8: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("hello")
    assert run_command(["predict", str(resnet8.folder), str(tmp_path / image)]) == 2
    assert message in capsys.readouterr().err


def test_a_student_of_another_library_keeps_that_librarys_keys(tmp_path: Path) -> None:
    name = "baseline/timm:mobilenetv3_small_050/digits"
    done = train(recipe(name, batch_size=8), dataclasses.replace(SHORT, max_steps=1),
                 out=tmp_path / "run")  # fmt: skip
    net = timm.create_model("mobilenetv3_small_050", num_classes=10)
    net.load_state_dict(load_file(done.folder / "student.safetensors"))


def student_file(
    path: Path, model: str, size: int, shown: Preprocessing | None = None, **options: Any
) -> Path:
    """A student with random weights, in the form of a run's."""
    network = create_model(model, 10, **options)
    state = {network.published_key(key): value for key, value in network.state_dict().items()}
    facts = {
        "model": model,
        "model_options": json.dumps(options),
        "class_names": json.dumps([str(c) for c in range(10)]),
        "student": "0",
        "role": json.dumps("the only student"),
        **(shown or preprocessing_of("imagefolder", image_size=size)).to_facts(),
    }
    save_file(state, path, facts)
    return path


def test_the_contract_is_in_the_file_and_beside_it(
    exported: tuple[str, Export], resnet18: Run
) -> None:
    """What a deployment needs is said: classes, each step from a picture to the input, the score."""
    to, folder = exported[0], exported[1].folder
    about = json.loads((folder / "student.json").read_text())
    shown = about["preprocessing"]
    digits = preprocessing_of("digits")
    assert about["format"] == to
    assert about["fastokd"] == fastokd.__version__
    assert about["recipe"] == "baseline/resnet18/digits"
    assert about["score"]["split"] == "test"
    assert about["score"]["top1"] == resnet18.last["test"]["student_top1"][0]
    assert shown["description"] == digits.sentence()
    assert (shown["resize"], shown["crop_size"], shown["interpolation"]) == (8, [8, 8], "bilinear")
    assert (shown["antialias"], shown["color_order"], shown["grayscale"]) == (True, "RGB", True)
    assert shown["native"] == {"size": 8, "levels": 17, "enlarged_by": "bicubic"}
    assert shown["normalize"] == {"scale": 1 / 255, "mean": [0.3101] * 3, "std": [0.3542] * 3}
    file = folder / about.pop("file")
    if to == "onnx":
        said = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        texts = ("format", "fastokd", "recipe", "model", "role")
        held = {name: v if name in texts else json.loads(v) for name, v in said.items()}
        assert held == about
    elif to == "torch-export":
        extra = {"student.json": ""}
        torch.export.load(file, extra_files=extra)
        assert json.loads(extra["student.json"]) == {**about, "file": file.name}
    elif file.suffix == ".safetensors":
        held = read_weights(file)
        assert held.preprocessing == digits
        assert held.fact("class_names") == about["class_names"]


def test_options_are_printed_as_they_are() -> None:
    options = {"num_classes": 3, "class": 1, 'x"); import os; (': "it's"}
    made = eval(call("seen", "a 'name'", options), {"seen": lambda name, **more: (name, more)})
    assert made == ("a 'name'", options)


def same_bytes(first: Path, second: Path) -> None:
    """The files are equal, and have no path of the folders or the sources."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    sources = [str(Path(str(module.__file__)).parents[1]) for module in (checked, torch)]
    for name in names:
        ours, theirs = ((folder / name).read_bytes() for folder in (first, second))
        assert ours == theirs, name
        for place in (*sources, str(first.parents[2]), str(second.parents[2])):
            assert place.encode() not in ours, (name, place)


def test_the_same_training_gives_the_same_bytes(resnet8: Run, tmp_path: Path) -> None:
    """Under another name, in another folder."""
    again = train(resnet8.recipe, SHORT, out=tmp_path / "elsewhere" / "another-name")
    runs = (resnet8.folder, again.folder)
    ours, theirs = ((run / "student.safetensors").read_bytes() for run in runs)
    assert ours == theirs
    for to in ("onnx", "torch-export", "hub"):
        same_bytes(*(export(run, to, run / "bytes" / to).folder for run in runs))
    # The page has the run's folder and speed; the rest is equal.
    times, names = (" s</td>", "images_per_second"), "|".join(run.name for run in runs)
    pages = [
        [
            line
            for line in (run / "report.html").read_text().splitlines()
            if not any(words in line for words in (str(run), *times))
            and not re.search(rf"\b({names})\b", line)
        ]
        for run in runs
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("to", ["safetensors", "torchvision", "timm"])
def test_the_same_student_gives_the_same_bytes(to: str, resnet18: Run, tmp_path: Path) -> None:
    same_bytes(*(export(resnet18.folder, to, tmp_path / "x" / name).folder for name in ("a", "b")))
