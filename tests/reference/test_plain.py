"""The loops stay plain: no fused op is dispatched, nothing but the students is imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastokd.reference
from fastokd.models import create_model
from fastokd.reference import Lambdas, ReferenceFFSD, ffsd_optimizers, ffsd_step
from fastokd.reference.common import ReferenceCohort
from fastokd.reference.kd import ReferenceKD, ReferenceOKDDipKD
from tests.reference.test_method_steps import CASES, SGD, Case, images_and_labels

FILES = sorted(Path(fastokd.reference.__file__).parent.glob("*.py"))


class Watch(TorchDispatchMode):
    """Notes the operators of this package, and whatever reads a number back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastokd":
            self.ours.append(str(func))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_fused_op_is_dispatched(case: Case) -> None:
    loop: ReferenceCohort = case.loop("resnet8", 10, case.students[-1], case.sharing[0])
    for name, value in case.attributes.items():
        setattr(loop, name, value)
    if isinstance(loop, (ReferenceKD, ReferenceOKDDipKD)):
        loop.set_teacher(create_model("resnet8", 10))
    peers = case.students[-1] - 1
    loop.belief_BPP = torch.rand(6, peers, peers)
    x_BCHW, labels_B = images_and_labels(1)[0]
    optimizers = loop.optimizers(**SGD)
    with Watch() as watch:
        loop.step(optimizers, x_BCHW.float(), labels_B)
    assert watch.ours == []
    if case.method != "kdcl":  # a search sample by sample, never a yardstick
        assert watch.reads == []


def test_nor_by_ffsd() -> None:
    model = ReferenceFFSD("resnet8", 10, 3)
    x_BCHW, labels_B = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
    optimizers = ffsd_optimizers(model, 0.1, 1e-4)
    with Watch() as watch:
        ffsd_step(model, optimizers, x_BCHW, labels_B, Lambdas())
    assert watch.ours == []


def test_the_watch_sees_a_fused_op_and_a_read() -> None:
    """What the other tests rest on."""
    with Watch() as watch:
        torch.ones(()).item()
    assert watch.reads
    library = torch.library.Library("fastokd", "FRAGMENT")
    library.define("watched(Tensor x) -> Tensor")
    library.impl("watched", torch.clone, "CompositeExplicitAutograd")
    with Watch() as watch:
        torch.ops.fastokd.watched(torch.ones(()))
    assert watch.ours == ["fastokd.watched.default"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_but_the_students_is_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] == "fastokd":
                assert name.split(".")[1] in ("models", "reference"), f"{path.name}: {name}"
