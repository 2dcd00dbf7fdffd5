"""The authors' checkpoints: files built from the published keys alone, in and out."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastokd
from fastokd import cli
from fastokd.checkpoint import save_checkpoint
from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.methods import create_method
from fastokd.models import Student, create_model
from fastokd.student import authors
from fastokd.student.convert import convert
from fastokd.student.file import read_weights
from fastokd.student.teacher import build_teacher
from tests.conftest import GOLDENS, fill_value, golden, golden_names
from tests.data.make import write_cifar

State = dict[str, Tensor]

NAMES = sorted(path.stem for path in (GOLDENS / "models").glob("*.npz"))
BRANCH_KEYS: dict[str, Callable[[str, int], str]] = {
    "okddip_resnet32": lambda key, i: re.sub(
        "^fc", f"classifier3_{i}", re.sub("^layer3", f"layer3_{i}", key)
    ),
    "okddip_vgg16": lambda key, i: re.sub(
        "^classifier", f"classifier3_{i}", re.sub("^layer4", f"layer3_{i}", key)
    ),
    "okddip_densenet_40_12": lambda key, i: (
        key.replace("features.denseblock3", f"Branch{i}")
        .replace("features.norm_final", f"norm_final_{i}")
        .replace("classifier", f"classifier3_{i}")
    ),
}


def random_value(key: str, shape: torch.Size) -> Tensor:
    return torch.rand(shape)


def published_state(stem: str, value: Callable[[str, torch.Size], Tensor] = random_value) -> State:
    """One network's state dict from the golden's names and shapes."""
    with np.load(GOLDENS / "models" / f"{stem}.npz") as arrays:
        shapes = [tuple(map(int, str(shape).split("x"))) for shape in arrays["param_shapes"]]
    state: State = {}
    for key, shape in zip(golden_names(f"models/{stem}", "param_names"), shapes, strict=True):
        state[key] = value(key, torch.Size(shape))
    for key in golden_names(f"models/{stem}", "buffer_names"):
        weight = state[f"{key.rpartition('.')[0]}.weight"]
        state[key] = value(key, weight.shape)
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state


def branch_state(stem: str, students: int) -> tuple[State, list[State]]:
    """A branch cohort's file, and what each student in it is alone."""
    rename = BRANCH_KEYS[stem]
    trunk = {key: v for key, v in published_state(stem).items() if rename(key, 0) == key}
    file: State = {}
    alone = []
    for index in range(students):
        alone.append({**published_state(stem), **trunk})
        file |= {rename(key, index): value for key, value in alone[-1].items()}
    return file, alone


def projections(width: int) -> State:
    return {f"{n}_weight.weight": torch.randn(width // 8, width) for n in ("query", "key")}


def transfusion(width: int, students: int = 2) -> State:
    together = width * students
    shapes = {"conv1.weight": (width, 1, 3, 3), "conv1_1.weight": (together, width, 1, 1)}
    for norm, channels in (("bn1", width), ("bn1_1", together)):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{entry}"] = (channels,)
    state = {f"trans_fusion_module.{k}": torch.rand(shape) for k, shape in shapes.items()}
    for norm in ("bn1", "bn1_1"):
        state[f"trans_fusion_module.{norm}.num_batches_tracked"] = torch.tensor(7)
    return state


def write(path: Path, state: State, *, legacy: bool = True, **facts: Any) -> Path:
    """FFSD's format where ``cfg`` is given, else OKDDip's."""
    if "cfg" in facts:
        content = {"weight": state, "epoch": 3, "index": "leader", **facts}
    else:
        optim = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
        content = {"state_dict": state, "epoch": 3, "optim_dict": optim, "test_accTop1": 74.2}
        content |= facts
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("stem", NAMES)
def test_every_published_network_is_known_by_its_keys(stem: str, tmp_path: Path) -> None:
    paper, name = stem.split("_", 1)
    state = published_state(stem)
    cfg = {"cfg": "anything"} if paper == "ffsd" else {}
    published = authors.read(write(tmp_path / "model0_12.pth", state, **cfg))
    assert published.model == name.removesuffix("_imagenet")
    assert published.paper.lower() == paper
    assert published.num_classes == (1000 if stem.endswith("imagenet") else 100)
    assert (published.sharing, published.students, published.has_leader) == (None, 1, False)
    assert same(published.state, state)


@pytest.mark.parametrize(
    ("stem", "model"),
    [
        ("ffsd_resnet20", None),
        ("ffsd_wrn_16_2", "wideresnet1602"),
        ("okddip_densenet_40_12", "densenet_40_12"),
    ],
)
@torch.no_grad()
def test_a_loaded_network_gives_the_published_logits(
    stem: str, model: str | None, tmp_path: Path
) -> None:
    """Behind DataParallel, in the old format, options pickled beside it; in float64 as it is."""
    filled = published_state(stem, fill_value)
    state = {f"module.{key}": value for key, value in filled.items()}
    facts = {"cfg": argparse.Namespace(model=model)} if stem.startswith("ffsd") else {}
    path = write(tmp_path / "best.pth", state, **facts)
    student = fastokd.student.authors.load(path, model=model, num_classes=100)
    assert isinstance(student, Student)
    assert not student.training
    generator = torch.Generator().manual_seed(zlib.crc32(stem.encode()))
    x_BCHW = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    want = golden(f"models/{stem}")["eval_logits_BC"]
    assert (student(x_BCHW) - want).abs().max() <= 1e-8 * want.abs().max()


@pytest.mark.parametrize("legacy", [True, False])
def test_ffsds_leader_brings_its_transfusion(legacy: bool, tmp_path: Path) -> None:
    """With exactly the keys of the published leader (goldens/steps)."""
    state = {**published_state("ffsd_resnet32"), **transfusion(64)}
    names = golden_names("steps/ffsd_resnet32_m2", "names")
    leader = {name.removeprefix("leader.") for name in names if name.startswith("leader.")}
    assert leader == {key for key in state if not key.endswith("num_batches_tracked")}
    path = write(tmp_path / "modelleader_best.pth", state, legacy=legacy, cfg="resnet32")
    published = authors.read(path)
    method = create_method("ffsd", Cohort(("resnet32", 3), 100, sharing="network").shape)
    missing, extra = method.load_state_dict(published.method_state, strict=False)
    assert not extra
    assert not [key for key in missing if key.startswith("transfusion")]
    assert torch.equal(
        published.method_state["transfusion.conv1_1.weight"],
        state["trans_fusion_module.conv1_1.weight"],
    )


@pytest.mark.parametrize("stem", BRANCH_KEYS)
def test_branch_cohorts(stem: str, tmp_path: Path) -> None:
    file, alone = branch_state(stem, 3)
    width = {"okddip_resnet32": 64, "okddip_vgg16": 512, "okddip_densenet_40_12": 132}[stem]
    published = authors.read(write(tmp_path / "last.pth", {**file, **projections(width)}))
    assert (published.sharing, published.students) == ("branch", 3)
    assert (published.has_leader, published.kept_student) == (True, 2)
    assert published.method_state.keys() == {"query.weight", "key.weight"}
    for index, state in enumerate(alone):
        assert same(published.student_state(index), state)
    assert bool(published.notes) == (stem == "okddip_densenet_40_12")


def test_the_published_branch_trainers_keys(tmp_path: Path) -> None:
    """The very names of goldens/steps/okddip_branch_resnet32_s4; and it runs as its students do."""
    file, alone = branch_state("okddip_resnet32", 4)
    file |= projections(64)
    names = golden_names("steps/okddip_branch_resnet32_s4", "names")
    assert {k for k in file if not k.endswith("num_batches_tracked")} == set(names)
    cohort = authors.load(write(tmp_path / "best.pth", file), model="resnet32", num_classes=100)
    assert isinstance(cohort, Cohort)
    x_BCHW = torch.randn(2, 3, 32, 32)
    last = create_model("resnet32", 100).eval()
    last.load_state_dict(alone[3])
    with torch.no_grad():
        torch.testing.assert_close(cohort(x_BCHW).logits_SBC[3], last(x_BCHW))


def test_one_and_network_cohorts(tmp_path: Path) -> None:
    file, _ = branch_state("okddip_densenet_40_12", 2)
    # ONE's DenseNet names its blocks as ResNets name their stages.
    file = {key.replace("Branch", "layer3_"): value for key, value in file.items()}
    gate = {"control_v1.weight": torch.ones(2, 60), "control_v1.bias": torch.ones(2)}
    gate |= {f"bn_v1.{e}": torch.ones(2) for e in ("weight", "bias", "running_mean", "running_var")}
    one = authors.read(write(tmp_path / "one.pth", {**file, **gate}))
    assert (one.sharing, one.has_leader, one.kept_student) == ("branch", False, 0)
    assert one.method_state.keys() >= {"control.weight", "norm.running_var"}

    single = published_state("okddip_resnet32")
    network = {f"stu{i}.{k}": v + (i if v.is_floating_point() else 0) for i in range(2)
               for k, v in single.items()}  # fmt: skip
    dml = authors.read(write(tmp_path / "dml.pth", network))
    assert (dml.sharing, dml.students, dml.has_leader) == ("network", 2, False)
    assert torch.equal(dml.student_state(1)["fc.bias"], single["fc.bias"] + 1)
    okddip = authors.read(write(tmp_path / "okddip.pth", {**network, **projections(64)}))
    assert (okddip.sharing, okddip.kept_student) == ("network", 1)


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = published_state("ffsd_resnet20")
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    published = authors.read(write(tmp_path / "old.pth", old, cfg={"model": "resnet20"}))
    assert published.state.keys() == state.keys()
    assert published.state["bn1.num_batches_tracked"] == 0


def drop(state: State, key: str) -> None:
    del state[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: drop(s, "fc.bias"), r"isn't resnet20 with 100 classes: 1 missing: fc\.bias$"),
        (lambda s: s.update(new=torch.ones(1)), r"1 extra: new$"),
        (
            lambda s: s.update({"fc.bias": torch.ones(9)}),
            r"1 of another shape: fc\.bias \(\[9\], not \[100\]\)$",
        ),
        (
            lambda s: [drop(s, k) for k in list(s) if k.startswith("layer3.2.conv")],
            r"2 missing: layer3\.2\.conv1\.weight, layer3\.2\.conv2\.weight$",
        ),
        (lambda s: s.update({"bn1.weight": "text"}), "'bn1.weight' among its weights"),
        (lambda s: s.clear(), "holds no state dict: it has 'weight'"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    state = published_state("ffsd_resnet20")
    change(state)
    path = write(tmp_path / "a.pth", state, cfg="resnet20")
    with pytest.raises(UserError, match=message):
        authors.load(path, model="resnet20", num_classes=100)


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    state = published_state("ffsd_resnet20")
    write(path, state, cfg="resnet20")
    with pytest.raises(UserError, match="unknown model 'resnet21'"):
        authors.load(path, model="resnet21")
    with pytest.raises(UserError, match="isn't resnet20 with 10 classes: 2 of another shape"):
        authors.load(path, model="resnet20", num_classes=10)
    with pytest.raises(UserError, match="student is 1, but the file has 0 to 0"):
        authors.read(path, model="resnet20").student(1)
    # Which model it is isn't said: the sentence names the one that fits but for a key.
    write(path, {key: value for key, value in state.items() if key != "bn1.weight"}, cfg="anything")
    with pytest.raises(UserError, match="nearest to resnet20 with 100 classes: 1 missing: bn1"):
        authors.load(path)
    write(path, state, cfg="resnet20", index="fusion")
    with pytest.raises(UserError, match="FFSD's fusion module"):
        authors.load(path)
    file, _ = branch_state("okddip_resnet32", 2)
    with pytest.raises(UserError, match="googlenet has no published branch form"):
        authors.load(write(path, file), model="googlenet")
    write(path, {key.replace("_1.", "_7."): value for key, value in file.items()})
    with pytest.raises(UserError, match=r"57 missing: layer3_1.*68 extra: layer3_7"):
        authors.load(path, model="resnet32")
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state dict, but a list"):
        authors.load(path)
    torch.save({"model": 1}, path)
    with pytest.raises(UserError, match="it has 'model'"):
        authors.load(path)
    with pytest.raises(UserError, match="No such file"):
        authors.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="can't be read"):
        authors.load(tmp_path)
    for damaged in (b"", b"nothing at all" * 9, b"PK\x03\x04" + bytes(99)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="no checkpoint of torch, or is damaged"):
            authors.load(path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_code_is_never_run(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    hostile = Hostile(f"touch {mark}")
    path = write(tmp_path / "a.pth", {"a": torch.ones(2)}, legacy=legacy, cfg=hostile)
    with pytest.raises(UserError, match=r"is refused.*system, which could run code"):
        authors.load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it was a live one


def test_converting_to_ours_and_back(tmp_path: Path) -> None:
    state = published_state("ffsd_resnet32")
    theirs = write(tmp_path / "theirs.pth", {**state, **transfusion(64)}, cfg="resnet32")
    lines = convert(theirs)
    ours = tmp_path / "theirs.safetensors"
    shown = "its pictures and classes are cifar100's: --dataset names another"
    assert lines == ["resnet32 with 100 classes, FFSD's", shown, f"written to {ours}"]
    assert same(load_file(ours), state)
    with pytest.raises(UserError, match="exists already"):
        convert(theirs)

    back = tmp_path / "modelleader_best.pth"
    assert "transfusion" in convert(ours)[0]
    content = torch.load(back, weights_only=True)
    assert (content["cfg"], content["index"]) == ("resnet32", "leader")
    assert content["weight"].keys() == {**state, **transfusion(64)}.keys()
    assert same({k: v for k, v in content["weight"].items() if k in state}, state)
    # The format before torch 1.6, which theirs is older than, is no zip archive.
    assert not back.read_bytes().startswith(b"PK")

    convert(ours, tmp_path / "best.pth", paper="OKDDip")
    assert same(torch.load(tmp_path / "best.pth", weights_only=True)["state_dict"], state)


def test_an_ffsd_runs_leader_goes_back_with_its_own_transfusion(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    student = create_model("wrn_16_2", 100)
    save_file(student.state_dict(), run / "student.safetensors", metadata={"model": "wrn_16_2"})
    method = create_method("ffsd", Cohort(("wrn_16_2", 4), 100, sharing="network").shape)
    tensors = {f"method.{key}": value for key, value in method.state_dict().items()}
    save_checkpoint(run / "checkpoints" / "last-000000009", tensors, {"epoch": 300})
    assert convert(run) == [f"wrn_16_2 for FFSD's code, written to {run / 'modelleader_best.pth'}"]
    content = torch.load(run / "modelleader_best.pth", weights_only=True)
    assert (content["cfg"], content["epoch"]) == ("wideresnet1602", 300)
    own = content["weight"]["trans_fusion_module.conv1_1.weight"]
    assert torch.equal(own, method.state_dict()["transfusion.conv1_1.weight"])
    assert same(
        authors.read(run / "modelleader_best.pth", model="wrn_16_2").state, student.state_dict()
    )
    shutil.rmtree(run / "checkpoints")
    assert "and the student has none" in convert(run, tmp_path / "without.pth")[0]


def test_back_only_to_networks_that_they_have(tmp_path: Path) -> None:
    state = create_model("resnet8", 10).state_dict()
    with pytest.raises(UserError, match="FFSD has no resnet8: it has densenet"):
        authors.save(tmp_path / "a.pth", state, model="resnet8")
    with pytest.raises(UserError, match=r"the state isn't resnet20's: .* missing"):
        authors.save(tmp_path / "a.pth", state, model="resnet20")
    with pytest.raises(UserError, match="choose FFSD or OKDDip"):
        authors.save(tmp_path / "a.pth", state, model="resnet20", paper="ffds")
    assert not (tmp_path / "a.pth").exists()


def test_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``evaluate`` scores on the data's own normalisation; ``convert`` takes one student out."""
    write_cifar(tmp_path, "cifar100", train=100, test=20)
    file, alone = branch_state("okddip_resnet32", 3)
    path = write(tmp_path / "best.pth", {**file, **projections(64)})
    base = ["evaluate", str(path), "--data-root", str(tmp_path), "--device", "cpu"]
    exact = ["--precision", "fp32", "--json"]
    assert cli.run_command([*base, "--dataset", "cifar100", *exact]) == 0
    scores = json.loads(capsys.readouterr().out)["test"]

    data = fastokd.data.load_dataset("cifar100", tmp_path)
    images = (data.test.images_NHWC / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    for index, state in enumerate(alone):
        model = create_model("resnet32", 100).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            top1 = (model(images.permute(0, 3, 1, 2)).argmax(1) == data.test.labels_N).float()
        assert scores["student_top1"][index] == pytest.approx(top1.mean().item())
    assert scores["leader_top1"] == scores["student_top1"][2]

    assert cli.run_command([*base]) == 2
    assert "add --dataset" in capsys.readouterr().err
    assert cli.run_command([*base, "--dataset", "digits"]) == 2
    assert "has 100 classes, and digits has 10" in capsys.readouterr().err

    out = tmp_path / "peer.safetensors"
    assert cli.run_command(["convert", str(path), "--out", str(out), "--student", "1"]) == 0
    assert "(student 1 of 3)" in capsys.readouterr().out
    assert torch.equal(load_file(out)["fc.bias"], alone[1]["fc.bias"])
    # It serves as a teacher: it names its classes.
    assert isinstance(build_teacher(read_weights(out), data), Student)


@pytest.mark.parametrize(
    ("stem", "facts", "options", "expected"),
    [
        ("ffsd_resnet20", {"cfg": "resnet20"}, {}, ("apple", 32, 0)),
        ("ffsd_resnet18_imagenet", {"cfg": "resnet18"}, {}, ("0", 224, 256)),
        ("okddip_resnet32", {}, {"dataset": "cifar100"}, ("apple", 32, 0)),
    ],
)
def test_what_convert_writes_says_how_its_pictures_are_shown(
    stem: str, facts: Any, options: Any, expected: tuple[Any, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.pth", published_state(stem), **facts)
    convert(path, tmp_path / "a.safetensors", **options)
    weights = read_weights(tmp_path / "a.safetensors")
    shown = weights.preprocessing
    assert (weights.fact("class_names")[0], shown.input_size, shown.eval_resize) == expected
    assert weights.about()["student"] == 0


def test_a_data_set_that_a_file_does_not_tell_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ImageNet network of 100 classes; unless FFSD's options beside it name the set."""
    state = create_model("resnet18", 100).state_dict()
    path = write(tmp_path / "a.pth", state, cfg="resnet18")
    assert cli.run_command(["convert", str(path)]) == 2
    assert "doesn't name its 100 classes: add --dataset" in capsys.readouterr().err
    assert cli.run_command(["convert", str(path), "--dataset", "digits"]) == 2
    assert "has 100 classes, and digits has 10" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    write(path, state, cfg=argparse.Namespace(model="resnet18", dataset="CIFAR-100"))
    assert cli.run_command(["convert", str(path)]) == 0
    assert "cifar100's" in capsys.readouterr().out
