"""Arguments of wrong shape, dtype, device, stride or layout raise; nothing crashes, however called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.ops.attention import attention_diversity, attention_map, attention_transfer
from fastokd.ops.cpp import capability
from fastokd.ops.feature_transfer import feature_transfer
from tests.ops.wrong_calls import CALLS, ODD, WRONG

# Two at once, for each operator; `python -m tests.ops.wrong_calls REPORT 300` takes many.
PAIRS = 20
# An optional tensor may be left out.
OPTIONAL = {
    "mixture_distillation": (1, 5, 6, 7, 8, 22),
    "peer_attention_distillation": (5, 6, 7, 8),
    "fused_bn_act": (5, 6),
    "fused_bn_act_backward": (2,),
}
# Of another size than all the others: where there are others, and sizes that must agree.
SIZES = ("nothing", "no samples", "cut", "doubled in front", "empty sizes", "fake sizes")
ALONE = ("attention_map", "shifted_map", "conv2d", "conv_transpose2d", "max_pool")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, cpp_ops: None) -> dict[str, dict[str, Any]]:
    """How every call ended; the process that makes them has to survive them all."""
    report = tmp_path_factory.mktemp("calls") / "report.jsonl"
    command = [sys.executable, "-m", "tests.ops.wrong_calls", str(report), str(PAIRS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    lines = report.read_text().splitlines() if report.exists() else []
    assert done.returncode == 0, f"it crashed at {lines[-1:]}: {done.stderr[-2000:]}"
    return {row["call"]: row for row in map(json.loads, lines)}


def test_nothing_crashes(ended: dict[str, dict[str, Any]]) -> None:
    assert len(ended) > 2000
    assert {call.split(":")[0] for call in ended} == set(CALLS)
    assert {row["ended"] for row in ended.values()} == {"raised", "returned"}


@pytest.mark.parametrize("op", CALLS)
def test_what_is_wrong_raises(op: str, ended: dict[str, dict[str, Any]]) -> None:
    right = CALLS[op]()
    tensors = {str(at): x for at, x in enumerate(right) if isinstance(x, torch.Tensor)}
    returned = []
    for place, x in tensors.items():
        optional = int(place) in OPTIONAL.get(op, ())
        must = [name for name in WRONG if not (name == "none" and optional)]
        if op in ("conv2d", "conv_transpose2d") and place == "1":
            # torch's own takes any weight that it can convert
            must = [name for name in must if name not in ("complex", "boolean")]
        if x.numel() == 1:  # one number in any number of dimensions is that number
            must = [name for name in must if name not in ("a dimension more", "two more")]
        if x.dim() > 1 and op not in ALONE:
            must += SIZES
        if (op, place) == ("memory_similarities_backward", "1"):
            must.remove("fake sizes")  # a memory of any width has a gradient as wide
        for name in must:
            row = ended.get(f"{op}: {place} {name}")
            if row is not None and row["ended"] == "returned":
                returned.append(f"{place} {name}")
        # Of another device: whatever comes out has no values.
        mixed = ended[f"{op}: {place} meta"]
        assert mixed["ended"] == "raised" or mixed["device"] == "meta", (op, place)
    assert returned == []
    right_call = ended[f"{op}: right"]
    if op == "conv_weight_grad" and capability() != "avx512bf16":
        assert "this CPU has no AVX-512 BF16" in right_call["said"]
    else:
        assert right_call["ended"] == "returned"


def test_the_list_of_wrongs_is_tried(ended: dict[str, dict[str, Any]]) -> None:
    tried = {call.split(": ", 1)[1].split(" ", 1)[-1] for call in ended if ";" not in call}
    assert {*WRONG, *ODD} <= tried


@pytest.mark.parametrize("batch", ["repeated", "every second", "overlapping"])
def test_any_batch_stride_gives_the_reference(batch: str, cpp_ops: None) -> None:
    """A map whose samples share memory is read as it is; its gradient is as of its copy."""
    x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last)
    made = {
        "repeated": lambda: x[:1].expand(3, -1, -1, -1),
        "every second": lambda: x[::2],
        "overlapping": lambda: torch.as_strided(x, (3, 4, 5, 5), (4, 1, 20, 4)),
    }[batch]()
    y = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    for op in (attention_transfer, attention_diversity, feature_transfer):
        fast, plain = (made.detach().requires_grad_() for _ in range(2))
        copied = plain.clone(memory_format=torch.channels_last)
        (ours,) = torch.autograd.grad(op(fast, y, impl="cpp"), fast)
        (theirs,) = torch.autograd.grad(op(copied, y, impl="torch"), copied)
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(attention_map(made, impl="cpp"), attention_map(made, impl="torch"))
