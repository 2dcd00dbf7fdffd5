"""Others' checkpoints: the weights are found where they are one network's, and no code is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastokd import authors
from fastokd.cohort import Cohort
from fastokd.convert import convert
from fastokd.errors import UserError
from fastokd.models import create_model
from fastokd.torch_file import state_dict_in
from fastokd.training.pretrained import begin_from

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return create_model("resnet20", 10).state_dict()


def behind(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


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
    assert bool(found.notes) == (form in ("an average beside it", "timm"))


def test_every_reader_finds_them(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(training_state(behind("module._orig_mod.", state)), path)
    made = Cohort(("resnet20", 1), 10, sharing="network", seed=5)
    begin_from(made, [path], [str(c) for c in range(10)], 0)
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
        (lambda s: {"model": create_model("resnet8", 10)}, r"fastokd.models.*could run code"),
    ],
)
def test_what_is_not_one_networks_is_said(
    content: Any, message: str, state: State, tmp_path: Path
) -> None:
    torch.save(content(state), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        state_dict_in(tmp_path / "w.pth")
