"""Others' checkpoints: the weights are found where they are one network's, and no code is run."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import dataclasses
import datetime
import enum
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.models import create_model
from fastokd.student import authors
from fastokd.student.convert import convert
from fastokd.student.init import begin_from, read_files
from fastokd.student.torch_file import state_dict_in

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return create_model("resnet20", 10).state_dict()


def behind(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


class Options(dict[str, Any]):
    """A class of dictionaries, as of easydict and mmengine, with attributes beside its entries."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


class Phase(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Config:
    lr: float = 0.1


Score = collections.namedtuple("Score", "top1 top5")


class Own(Tensor):
    """A tensor whose class could do anything."""


def training_state(state: State) -> dict[str, Any]:
    """What trainers keep beside the weights, NumPy's numbers among it."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.05 * 0.1 ** np.sum(np.asarray([150, 180, 210]) < 240)
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": {"scale": 65536.0},
        "criterion": {"weight": torch.ones(10)},
        "opt": argparse.Namespace(lr=np.float32(0.1), path=pathlib.PurePosixPath("a/b")),
        "best": np.float64(0.7),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "history": np.arange(6).reshape(2, 3),
        "names": np.array(["a", "b"]),
        "type": np.dtype("float32"),
        "began": datetime.datetime(2026, 1, 1),
        "took": datetime.timedelta(seconds=3),
        "args": types.SimpleNamespace(epochs=3),
        "folder": pathlib.Path("runs"),
        "seen": collections.defaultdict(list, {"a": [1]}),
        "counts": collections.Counter("aab"),
        "torch": torch.__version__,
        "epoch": 3,
        "tags": frozenset("a"),
        "last": collections.deque([1, 2], 5),
        "day": datetime.date(2026, 1, 1),
        "zone": datetime.timezone.utc,
        "generator": np.random.default_rng(0),
        "run": uuid.UUID(int=1),
        "phase": Phase.TRAIN,
        "config": Config(),
        "score": Score(0.7, 0.9),
        "options": Options(lr=0.1, data=Options(size=32)),
        "loss_fn": nn.CrossEntropyLoss(torch.ones(10)),
        "sgd": optimizer,
        "activation": nn.functional.relu,
    }


FORMS: dict[str, Any] = {
    "plain": lambda s: s,
    "compiled": lambda s: behind("_orig_mod.", s),
    "DataParallel of a compiled one": lambda s: behind("module._orig_mod.", s),
    "a compiled DataParallel": lambda s: behind("_orig_mod.module.", s),
    "a compiled part": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "an averaged one": lambda s: {"n_averaged": torch.tensor(3), **behind("module.", s)},
    "an averaged one behind DataParallel": lambda s: {
        "module.n_averaged": torch.tensor(3), **behind("module.module.", s)
    },
    "Lightning": lambda s: {
        "state_dict": behind("model.", s), "hyper_parameters": {"lr": 0.1}, "loops": {},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}],
    },
    "Lightning with a loss's weights": lambda s: {
        "state_dict": {**behind("net.", s), "criterion.weight": torch.ones(10)}
    },
    "Lightning of a compiled one": lambda s: {"state_dict": behind("model._orig_mod.", s)},
    "an average beside it": lambda s: {"model": s, "model_ema": behind("module.", other(s))},
    "timm": lambda s: {"state_dict": s, "state_dict_ema": other(s), "args": argparse.Namespace()},
    "an average alone": lambda s: {"state_dict_ema": behind("module.", s), "epoch": 1},
    "a state within a state": lambda s: {"state": {"model": behind("module.", s)}, "epoch": 1},
    "the model of a state within a state": lambda s: {
        "state": {"model": s, "critic": other(s)}, "epoch": 1
    },
    "a teacher beside it": lambda s: {"model": s, "teacher": other(s)},
    "under another name": lambda s: {"classifier": s, "optimizer": {"state": {}}},
    "model_state": lambda s: {"epoch": 3, "model_state": s},
    "net": lambda s: {"net": behind("module.", s), "acc": 91.2, "epoch": 1},
    "a whole training state": training_state,
    "FSDP": lambda s: behind("_fsdp_wrapped_module.", s),
    "checkpointed": lambda s: behind("_checkpoint_wrapped_module.", s),
    "FSDP of a compiled one": lambda s: behind("module._fsdp_wrapped_module._orig_mod.", s),
    "Lightning with measures": lambda s: {"state_dict": {
        **behind("model.", s), "loss_fn.weight": torch.ones(10), "train_acc.tp": torch.ones(10),
        "acc.tp": torch.ones(1), "accuracy.total": torch.ones(1), "val_loss.n": torch.ones(1),
    }},
    "Lightning with an average": lambda s: {
        "state_dict": {**behind("model.", s), **behind("ema_model.module.", other(s))}
    },
    "a number beside them": lambda s: {**s, "epoch": 3, "best": 0.5},
    "a number beside the wrapped": lambda s: {**behind("module.", s), "epoch": 3},
    "options beside them": lambda s: {**behind("module.", s), "opt": {"lr": torch.tensor(1.0)}},
    "in a class of dictionaries": lambda s: {"model": Options(**s), "epoch": 3},
}  # fmt: skip


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found(form: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(FORMS[form](state), path)
    found = state_dict_in(path)
    assert found.weights.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.weights.items())
    noted = ("an average beside it", "timm", "Lightning with an average")
    assert bool(found.notes) == (form in noted)


def test_every_reader_finds_them(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(training_state(behind("module._orig_mod.", state)), path)
    made = Cohort(("resnet20", 1), 10, sharing="network", seed=5)
    begin_from(made, read_files([path]), [str(c) for c in range(10)], 0)
    published = authors.read(path)
    assert (published.model, published.num_classes) == ("resnet20", 10)
    for ours in (made.student_state(0), published.state):
        assert all(torch.equal(ours[key], value) for key, value in state.items())
    convert(path)
    assert load_file(tmp_path / "w.safetensors").keys() == state.keys()


def test_what_is_compressed_is_refused(tmp_path: Path) -> None:
    """Even where it doesn't become smaller: torch writes none, and its reader would unpack it."""
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"w": torch.randint(256, (4000,), dtype=torch.uint8)}, plain)
    with zipfile.ZipFile(plain) as ours, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for member in ours.infolist():
            out.writestr(member.filename, ours.read(member))
        assert sum(member.file_size for member in out.infolist()) < packed.stat().st_size
    with pytest.raises(UserError, match="refused: it unpacks to more than it holds"):
        state_dict_in(packed)


@pytest.mark.parametrize("numpy", [b"numpy.core", b"numpy._core"])
def test_numpy_of_either_version(numpy: bytes, state: State, tmp_path: Path) -> None:
    """NumPy 1 says `numpy.core`, NumPy 2 `numpy._core`: neither is called."""
    path = tmp_path / "w.pth"
    content = {"model": state, "lr": np.float64(0.1), "map": np.ones(3)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert re.search(rb"numpy\._?core\.multiarray\nscalar", written)
    path.write_bytes(re.sub(rb"numpy\._?core", numpy, written))
    assert state_dict_in(path).weights.keys() == state.keys()


def test_a_protocol_that_torch_does_not_read_is_said(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(
        UserError, match=r"another pickle protocol than.*save it again by torch.save"
    ):
        state_dict_in(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"student": s, "teacher": other(s)}, "state dicts, student, teacher, and does"),
        (lambda s: {"model": s, "state_dict": other(s)}, "state dicts, model, state_dict, and"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "holds no state dict: it has 'epoch', 'lr'"),
        (lambda s: dict.fromkeys("abcde", 1), "'a', 'b', 'c', 'd', 'e'$"),
        (lambda s: dict.fromkeys("abcdefg", 1), "'a', 'b', 'c', 'd', 'e' and 2 more$"),
        (lambda s: {}, "it has nothing"),
        (lambda s: {"optimizer": {"state": s}}, "holds no state dict"),
        (lambda s: {"model": {**s, "conv1.weight": "x"}}, "'conv1.weight' among its weights"),
        (lambda s: list(s.values()), "but a list"),
        (lambda s: {k: v.numpy() for k, v in s.items()}, "is a NumPy array: .*torch.from_numpy"),
        (lambda s: {"model": {"w": s["fc.bias"].numpy()}}, "'w' is a NumPy array"),
        (lambda s: {"epoch": np.float64(3)}, "'epoch' is a numpy.*could run code"),
        (lambda s: create_model("resnet8", 10), r"but a fastokd\.models.*could run code: save its"),
        (lambda s: {"fc.bias": s["fc.bias"].as_subclass(Own)}, r"holds .*\.Own, which could run"),
        (lambda s: {**s, "fc.bias": s["fc.bias"].to_sparse()}, "'fc.bias' .* no plain tensor"),
        (lambda s: {"model": create_model("resnet8", 10)}, r"fastokd.models.*could run code"),
    ],
)
def test_what_is_not_one_networks_is_said(
    content: Any, message: str, state: State, tmp_path: Path
) -> None:
    torch.save(content(state), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        state_dict_in(tmp_path / "w.pth")


def test_a_safetensors_file_of_another_name_is_read(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.bin")
    assert state_dict_in(tmp_path / "w.bin").weights.keys() == state.keys()
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:9] + b"?" + data[10:])
    with pytest.raises(UserError, match="or is damaged"):
        state_dict_in(tmp_path / "w.bin")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n",
            "git-LFS pointer.*lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html></html>", "is a web page in place of the file"),
        (b'<?xml version="1.0"?><Error/>', "is a web page in place of the file"),
    ],
)
def test_what_was_fetched_instead_is_named(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        begin_from(Cohort(("resnet8", 1), 10), read_files([tmp_path / name]), ["a"] * 10, 0)


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/constants.pkl", bytes(1000))
    with pytest.raises(UserError, match=r"TorchScript archive.*save its state_dict\(\)"):
        state_dict_in(path)


class Calls:
    """Calls ``function`` when it is unpickled; ``filled`` is its state, its items and its entries."""

    def __init__(self, function: Any, *arguments: Any, filled: tuple[Any, ...] = ()) -> None:
        self.made = (function, arguments, *filled)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made

    def __call__(self) -> None:
        """That pickle takes it for a function."""


WAYS: dict[str, Any] = {
    "a process": lambda mark: Calls(subprocess.getoutput, f"touch {mark}"),
    "Python's own": lambda mark: Calls(builtins.exec, f"import os; os.mkdir({str(mark)!r})"),
    "a method": lambda mark: Calls(pathlib.Path(mark).touch),
    "a copy": lambda mark: Calls(shutil.copy, __file__, str(mark)),
    "what one makes is called": lambda mark: Calls(Calls(getattr, Path, "touch"), mark),
    "through torch's function": lambda mark: Calls(
        torch._tensor._rebuild_from_type_v2, subprocess.getoutput, str, (f"touch {mark}",), None
    ),
    "with a state": lambda mark: Calls(
        subprocess.getoutput, f"touch {mark}", filled=({"__class__": int, "__setstate__": 1},)
    ),
    "with entries": lambda mark: Calls(
        subprocess.getoutput, f"touch {mark}", filled=({"x": 1}, None, iter([("items", 1)]))
    ),
    "with items and a state": lambda mark: Calls(
        subprocess.getoutput, f"touch {mark}", filled=({"x": 1}, iter([1]))
    ),
    "a system's call": lambda mark: Calls(os.system, f"touch {mark}"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_stands_in_runs_nothing(way: str, legacy: bool, state: State, tmp_path: Path) -> None:
    """Weights beside it are read, or the file is refused."""
    path, mark = tmp_path / "w.pth", tmp_path / "ran"
    content = {"model": state, "x": WAYS[way](mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused = (
        "a method",
        "what one makes is called",
        "through torch's function",
        "with items and a state",
        "a system's call",
    )
    with (
        pytest.raises(UserError, match="is refused") if way in refused else contextlib.nullcontext()
    ):
        assert state_dict_in(path).weights.keys() == state.keys()
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert mark.exists()  # it was a live one


def test_nothing_that_a_file_names_is_imported(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": state, "x": Phase.TRAIN}, path, _use_new_zipfile_serialization=False)
    ours = f"c{__name__}\nPhase\n".encode()
    assert ours in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(ours, b"cthis\nZen\n"))
    assert state_dict_in(path).weights.keys() == state.keys()
    assert "this" not in sys.modules


def test_more_names_than_a_state_has_are_refused(state: State, tmp_path: Path) -> None:
    kinds = [type(f"Kind{i}", (), {"__module__": __name__}) for i in range(300)]
    for kind in kinds:
        globals()[kind.__name__] = kind
    torch.save({"model": state, "kinds": kinds}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"is refused: .*Kind0, which could run code"):
        state_dict_in(tmp_path / "w.pth")
