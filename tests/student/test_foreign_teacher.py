"""Teachers of torchvision and timm: their own normalisation, size and classes; several averaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from fastokd.checkpoint import fingerprint
from fastokd.data import DatasetSplits, Split
from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import UserError
from fastokd.models import create_model
from fastokd.models.pretrained import imagenet_classes, installed, published
from fastokd.run.identity import other_teacher
from fastokd.student.class_names import places_of
from fastokd.student.teacher import build_teacher, build_teachers, kept_teachers, to_keep
from fastokd.student.teacher_file import names_of, read_teacher, taken_from
from fastokd.student.weights import Weights

# Its published weights were trained at 160 x 160, normalised by a mean and a deviation of their own.
TIMM = "timm:test_resnet.r160_in1k"
OURS = Preprocessing(32, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
FOLDERS = ("Egyptian_cat", "tabby", "golden-retriever")


def folder(names: tuple[str, ...] = FOLDERS, shown: Preprocessing = OURS) -> DatasetSplits:
    size = (6, shown.input_size, shown.input_size, 3)
    images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(6) % len(names))
    return DatasetSplits("imagefolder", names, shown, split, split, split)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(TIMM.partition(":")[2], pretrained=False, num_classes=1000)
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
    return made.eval()


@pytest.fixture(scope="module")
def named(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    return f"{TIMM}={path}"


def as_published(net: nn.Module, images_BHWC: Tensor) -> Tensor:
    """The library's own way from pixels to logits."""
    said = published(TIMM)
    x = transforms.to_dtype(images_BHWC.permute(0, 3, 1, 2), torch.float32, scale=True)
    x = transforms.resize(x, [said.input_size] * 2, antialias=True)
    with torch.no_grad():
        logits: Tensor = net(transforms.normalize(x, list(said.mean), list(said.std)))
    return logits


@pytest.mark.parametrize("size", [32, 200])
def test_a_foreign_teacher_sees_what_its_library_would_show_it(
    size: int, net: nn.Module, named: str
) -> None:
    data = folder(shown=dataclasses.replace(OURS, input_size=size))
    teacher = build_teacher(read_teacher(named), data)
    images = data.train.images_NHWC
    classes = imagenet_classes()
    places = [classes.index(name) for name in ("Egyptian cat", "tabby", "golden retriever")]
    wanted = as_published(net, images)[:, places]
    found = teacher(OURS.normalized(images))
    assert published(TIMM).mean != OURS.mean
    assert published(TIMM).input_size == 160
    assert torch.allclose(found, wanted, atol=1e-5)
    assert wanted.std() > 1e-2


def test_a_network_with_the_data_s_own_classes_keeps_its_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = torchvision.models.squeezenet1_1(num_classes=3).eval()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    weights = read_teacher(f"torchvision:squeezenet1_1={tmp_path / 'own.pth'}")
    assert weights.fact("num_classes") == 3
    data = folder(("c", "a", "b"), dataclasses.replace(OURS, input_size=224))
    x = OURS.normalized(data.train.images_NHWC[:2])
    mean, std = (torch.tensor(v)[:, None, None] for v in (OURS.mean, OURS.std))
    want = transforms.normalize(x * std + mean, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert torch.allclose(build_teacher(weights, data)(x), own(want), atol=1e-5)
    with pytest.raises(UserError, match="has 3 classes without names, and imagefolder has 2"):
        build_teacher(weights, folder(("a", "b")))


def test_several_are_averaged(net: nn.Module, named: str, tmp_path: Path) -> None:
    data = folder()
    torch.save(create_model("torchvision:squeezenet1_1", 3).net.state_dict(), tmp_path / "b.pth")
    both = f"{named}+torchvision:squeezenet1_1={tmp_path / 'b.pth'}"
    teachers = [read_teacher(name) for name in names_of([both])]
    assert [weights.model for weights in teachers] == [TIMM, "torchvision:squeezenet1_1"]
    x = OURS.normalized(data.train.images_NHWC)
    with torch.no_grad():
        each = [build_teacher(weights, data)(x) for weights in teachers]
        mean = build_teachers(teachers, data)(x)
        assert torch.equal(mean, (each[0] + each[1]) / 2)
    # Of any temperature: the geometric mean of the teachers' probabilities.
    geometric = torch.stack([(z / 3).softmax(1).log() for z in each]).mean(0).softmax(1)
    assert torch.allclose((mean / 3).softmax(1), geometric, atol=1e-6)

    for kept in to_keep(tmp_path, teachers):
        kept.path.write_bytes(kept.to_bytes())
    copies = kept_teachers(tmp_path)
    with torch.no_grad():
        assert torch.equal(build_teachers(copies, data)(x), mean)
    assert [fingerprint(w.state) for w in copies] == [fingerprint(w.state) for w in teachers]
    assert other_teacher(tmp_path, (both,)) == []
    assert other_teacher(tmp_path, tuple(both.split("+"))) == []
    (difference,) = other_teacher(tmp_path, (named,))
    assert "squeezenet1_1" in difference
    # A copy is a teacher under its own name, too: a trial in another process is given that.
    for copy in copies:
        again = read_teacher(taken_from(copy))
        assert fingerprint(again.state) == fingerprint(copy.state)
        assert {k: again.facts.get(k) for k in ("model", "mean", "num_classes")} == {
            k: copy.facts.get(k) for k in ("model", "mean", "num_classes")
        }


def test_weights_that_a_library_has_in_its_cache(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="aren't in the cache of torchvision, and nothing is down"):
        read_teacher("torchvision:resnet18")
    file = tmp_path / "checkpoints" / published("torchvision:resnet18").file
    file.parent.mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    assert installed("torchvision:resnet18") == file
    weights = read_teacher("torchvision:resnet18")
    assert weights.fact("class_names") == imagenet_classes()
    assert weights.preprocessing.input_size == 224


def test_the_file_s_name_chooses_among_a_library_s_weights() -> None:
    both = {
        published("torchvision:resnet50", f"resnet50-{x}.pth") for x in ("0676ba61", "11ad3fa6")
    }
    assert {one.eval_resize for one in both} == {256, 232}
    assert published("torchvision:resnet50", "mine.pth").file == "resnet50-11ad3fa6.pth"


@pytest.mark.parametrize(
    ("ours", "theirs", "places"),
    [
        (["b", "a"], ["a", "b", "c"], [1, 0]),
        (["Big Cat", "dog"], ["dog", "big_cat"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["n02123045", "Persian cat"], imagenet_classes(), [281, 283]),
        (["tiger cat", "Felis domesticus x"], ["Felis-domesticus-X", "Tiger cat"], [1, 0]),
    ],
)
def test_classes_are_found_by_name(ours: list[str], theirs: list[str], places: list[int]) -> None:
    assert places_of(ours, theirs, "t", "d") == places


def test_imagenet_s_own_folders_need_no_names() -> None:
    names = [f"n{number:08d}" for number in range(1000)]
    assert places_of(names, imagenet_classes(), "t", "d") == list(range(1000))
    assert places_of(names[::-1], imagenet_classes(), "t", "d") == list(range(1000))[::-1]


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (["cat", "dog"], r"lacks 1 of d's 2 \(dog\)"),
        (["Cat", "CAT"], "'Cat' and 'CAT' of d are one class, 'cat'"),
        (["x y", "cat"], "'x y' of d may be 'x_y' and 'X-Y'"),
    ],
)
def test_classes_that_are_not_to_be_found_are_refused(ours: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        places_of(ours, ["cat", "x_y", "X-Y"], "t", "d")


def test_what_is_no_teacher_is_refused(net: nn.Module, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(net.state_dict())
    headless = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "net.pt2").write_bytes(b"PK")
    for name, says in {
        f"{TIMM}={tmp_path / 'headless.pth'}": "has no classifier of timm:test_resnet",
        f"{TIMM}={tmp_path / 'other.pth'}": "is no timm:test_resnet",
        f"{TIMM}={tmp_path / 'none.pth'}": "there is no such file",
        f"{TIMM}=": "name the file of its weights after the =",
        "torchvision:resnet19=x.pth": "unknown torchvision model 'resnet19'",
        str(tmp_path / "net.pt2"): "is a graph, which could run code: export it with `--to safe",
        "timm:resnet18d_no": "unknown timm model",
    }.items():
        with pytest.raises(UserError, match=says):
            read_teacher(name)


def test_a_student_s_file_says_its_own_preprocessing(tmp_path: Path) -> None:
    student = create_model("torchvision:squeezenet1_1", 3)
    facts = {"model": "torchvision:squeezenet1_1", "class_names": '["a", "b", "c"]'}
    path = tmp_path / "s.safetensors"
    path.write_bytes(Weights(path, student.state_dict(), facts | OURS.to_facts()).to_bytes())
    weights = read_teacher(f"torchvision:squeezenet1_1={path}")
    assert weights.preprocessing == OURS
    with pytest.raises(UserError, match="holds a torchvision:squeezenet1_1: leave timm"):
        read_teacher(f"{TIMM}={path}")
