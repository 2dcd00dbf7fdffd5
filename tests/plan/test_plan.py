"""``fastokd plan``: for every recipe, on every device, without data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.methods import list_methods
from fastokd.plan import devices
from fastokd.plan.devices import GPUS, Cpu
from fastokd.plan.ops import Op, Product
from fastokd.plan.plan import layers, plan
from fastokd.plan.roofline import (
    all_reduce,
    fuse,
    launches,
    link_seconds,
    student_traffic,
    terms,
)
from fastokd.plan.table import lines
from fastokd.plan.trace import trace_ours, trace_reference
from fastokd.recipe.names import recipe

# Of one class, with other scores.
ABLATIONS = [f"okddip_{name}" for name in ("entropy", "mean", "symmetric")]
TINY = "okddip-branch/resnet8/cifar100"


def op(kind: str, phase: str = "forward", **settings: int) -> Op:
    values = {"flops": 0, "bytes": 8, "launches": 1, **settings}
    return Op(kind, phase, "", kind, **values)


@pytest.mark.parametrize(
    "method", [m for m in list_methods() if m not in ABLATIONS and m != "ffsd"]
)
def test_every_method_is_traced(method: str, cpp_ops: None) -> None:
    form = "" if method in ("baseline", "cl_ilr", "one", "pcl") else "-network"
    of = (
        recipe(f"{method}{form}/resnet8/digits")
        if method != "ind"
        else recipe("ind/resnet8/digits")
    )
    ours = trace_ours(of, 4, "loop", "bf16", "auto")
    assert ours.parameters > 0
    if method == "kdcl":
        with pytest.raises(UserError, match="reads values"):
            trace_reference(of, 4)
    else:
        # With one loss and one update, a step has at most about as many launches as the published
        # one, with autocast's conversions.
        assert launches(ours.ops) < 1.1 * launches(trace_reference(of, 4).ops)


@pytest.mark.parametrize(
    "name",
    [
        "okddip-network/resnet18/imagenet",
        "okddip-branch/densenet_40_12/cifar10",
        "okddip-branch/vgg16/cifar100",
        "ffsd/resnet20/cifar100",
        "okddip-network/resnet20+wrn_16_2+resnet20/cifar100",
    ],
)
def test_every_kind_of_student_is_traced(name: str) -> None:
    of = recipe(name)
    step = trace_ours(of, 8, "loop", "bf16", "torch")
    assert step.peak_bytes > step.activation_bytes > 0


@pytest.mark.parametrize("model", ["resnet34", "densenet_40_12"])
def test_the_published_gate_reads_any_trunk(model: str) -> None:
    dataset = "imagenet" if model == "resnet34" else "cifar10"
    assert trace_reference(recipe(f"one/{model}/{dataset}"), 2).ops


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", TINY, "--device", "a100", "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size_per_gpu"] == 64
    counted, modelled = found["counted"], found["modelled"]
    assert counted["fits"]
    assert counted["launches_eager"]["grouped"] < counted["launches_eager"]["reference"]
    assert sum(row["flops"] for row in counted["layers"]) == counted["executed_flops"]
    assert sum(row["bytes"] for row in counted["layers"]) == counted["bytes"]
    ways = modelled["ways"]
    eager, captured, compiled = (
        ways[f"grouped {how}"] for how in ("eager", "captured", "compiled + captured")
    )
    assert compiled["kernels"] < captured["kernels"] == eager["kernels"]
    # A replay has no launches of the host.
    assert captured["host_ms"] == compiled["host_ms"] == 0
    assert eager["step_ms"] == eager["host_ms"] > captured["step_ms"]
    beside = ways["loop captured, side by side"]
    assert beside["bound_ms"] < beside["step_ms"] < ways["loop captured"]["step_ms"]
    assert not any("vmap" in name for name in ways), "traced in float32"
    for way in ways.values():
        assert way["device_ms"] == pytest.approx(sum(way["terms_ms"].values()))
        assert way["bound_ms"] < way["step_ms"]
    assert modelled["images_per_second"] < modelled["images_per_second_at_most"]
    assert modelled["hours_at_least"] < modelled["hours"]
    # A ring of two GPUs: each sends half of the gradients twice.
    assert modelled["gradient_traffic_bytes"] == counted["gradient_bytes"]
    assert modelled["hours"] == pytest.approx(
        300 * 391 * 128 / modelled["images_per_second"] / 3600
    )
    assert run_command(["plan", TINY, "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "counted\n" in text
    assert "modelled: bf16 and memory measured elsewhere on an H100" in text
    assert "students on GPUs" not in text, "a branch cohort's students share their trunk"
    assert run_command(["plan", "okddip-network/resnet8/cifar100", "--gpus", "2"]) == 0
    assert "students on GPUs" in capsys.readouterr().out


def test_the_table_has_each_way_of_sharing_by_its_own_figures() -> None:
    found = plan(recipe("okddip-network/resnet8/cifar100"), "a100", gpus=2)
    modelled = found["modelled"]
    said = {line.split()[0]: line for line in lines(found)}
    for word, name in (("gradients", "gradient_traffic"), ("students", "students_across_gpus")):
        assert f" {modelled[f'{name}_bytes'] / 1e6:,.1f} MB a step" in said[word]
        assert f" {modelled[f'{name}_ms']:.3g} ms" in said[word]


def test_hours_count_the_images_that_are_trained_on() -> None:
    """With 20,000 of 50,000 images held out an epoch has 235 batches, not 391."""
    of = recipe("baseline/resnet8/cifar100", val=20_000)
    modelled = plan(of, "h100")["modelled"]
    seconds = of.batch_size / modelled["images_per_second"]
    assert modelled["hours"] == pytest.approx(300 * 235 * seconds / 3600)


def test_an_engine_that_cant_serve_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = "okddip-network/resnet8+resnet20+resnet8/cifar100"
    counts = plan(recipe(mixed, batch_size=4), "h100")["counted"]["launches_eager"]
    assert isinstance(counts["loop"], int)
    assert isinstance(counts["grouped"], str)


def test_what_doesnt_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = devices._gpu("small", 1, 1, 1, 1e-3, 1, "data sheet")
    monkeypatch.setitem(GPUS, "rtx4090", small)
    assert not plan(recipe(TINY), "rtx4090")["counted"]["fits"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device h1000", "h100"),
        ("--gpus 0", "gpus is 0: it must be at least 1"),
        ("--batch-size 0", "batch_size is 0"),
        ("--batch-size 4 --gpus 8", "a batch has 4 images"),
        ("--device cpu --gpus 2", "the device is cpu"),
    ],
)
def test_bad_input(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cpu, "calibrated", staticmethod(lambda precision: cpu()))
    assert run_command(["plan", TINY, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_fusion() -> None:
    """Two groups of three between products; the second has one reduction; a phase ends a group."""
    ops = [
        *[op("pointwise")] * 3,
        op("product"),
        op("pointwise"),
        op("norm"),
        op("pointwise"),
        op("pointwise", "backward"),
        op("product", "backward", launches=2),
        op("optimizer", "optimizer"),
    ]
    fused = fuse(ops)
    assert [(o.kind, o.launches) for o in fused] == [
        ("fused", 1),
        ("product", 1),
        ("fused", 2),
        ("fused", 1),
        ("product", 2),
        ("optimizer", 1),
    ]
    assert sum(o.bytes for o in fused) == sum(o.bytes for o in ops)
    assert launches(ops) == 11


def test_the_roofline_is_the_slower_of_both() -> None:
    h100 = GPUS["h100"]
    arithmetic = Op("mm", "forward", "", "product", int(798e12), 1, 1, (), torch.bfloat16)
    memory = op("pointwise", bytes=int(3e12))
    tiny = op("pointwise", launches=3)
    assert h100.bound(arithmetic) == pytest.approx(1.0)
    assert h100.bound(memory) == pytest.approx(1.0)
    assert h100.bound(tiny) == pytest.approx(3 * h100.node_seconds)


def test_the_expected_time_adds_latency_and_a_share_of_the_roofline() -> None:
    h100 = GPUS["h100"]
    latency, share = devices.BEHIND["norm"]
    norm = op("norm", bytes=int(3e12), launches=4)
    assert h100.seconds(norm) == pytest.approx(4e-6 * latency + 1 / share)
    # Side by side, latencies are hidden and traffic isn't.
    assert h100.seconds(norm, 4) == pytest.approx(1e-6 * latency + 1 / share)
    mine = replace(norm, layer="students.0.bn1")
    assert terms([norm, mine], h100, students=4) == {
        "norm": h100.seconds(norm) + h100.seconds(mine, 4)
    }
    # A float32 product reaches the rate of the CUDA cores.
    product = replace(op("product", flops=int(66.9e12)), products=(Product(1, 1, 1),))
    assert h100.seconds(product) == pytest.approx(1.0, rel=1e-4)


def test_a_compiler_s_kernels_are_slower_than_their_roofline() -> None:
    ops = fuse([op("pointwise", bytes=int(3e12)), op("norm")])
    assert terms(ops, GPUS["h100"]) == {"fused": pytest.approx(1 / 0.42, rel=1e-3)}


def test_traffic() -> None:
    h100 = GPUS["h100"]
    assert all_reduce(8000, 1) == 0
    assert all_reduce(8000, 4) == 2 * 3 / 4 * 8000
    of = recipe(TINY, batch_size=10)
    across = student_traffic(of, exchanged=656, shared_bytes=1000, gpus=2, device=h100)
    # The other GPU has half of the numbers, of two bytes each; the shared gradients are reduced.
    assert across == 2 * 10 * 656 / 2 + 1000
    assert link_seconds(across, h100) == across / h100.link


def test_layers_of_all_students_stand_together() -> None:
    step = trace_ours(recipe(TINY), 4, "loop", "bf16", "torch")
    names = [row["layer"] for row in layers(step.ops)]
    assert "students.*.layer3.0.conv2" in names
    assert len(names) == len(set(names))


def cpu() -> Cpu:
    """A CPU that copies 1 B/s in cache and 0.5 B/s in memory, and multiplies at 1 FLOP/s."""
    rates = {torch.float32: [1.0, 0.5], torch.bfloat16: [1.0, 0.5]}
    return Cpu("fp32", 0.25, [1000, 2000], rates, 1 << 30)


def test_a_cpu_copies_at_the_rate_of_the_working_set() -> None:
    machine = cpu()
    rates = [machine.copy_rate(size, torch.float32) for size in (10, 1000, 1500, 2000, 9999)]
    assert rates == [1.0, 1.0, 0.75, 0.5, 0.5]
    assert machine.seconds(op("pointwise", bytes=100)) == 100.25


def test_a_cpus_products_are_measured_in_cache() -> None:
    machine = cpu()
    product = Product(4096, 16, 144)
    seconds = machine.product_seconds(product, torch.float32)
    ((cut, dtype),) = machine.products
    assert (cut.n, cut.k, dtype) == (16, 144, torch.float32)
    assert 4 * (cut.m * 144 + 144 * 16 + cut.m * 16) <= devices.CACHED_BYTES
    assert seconds > 0
    # The gradient of a narrow layer's weight is a long sum, and cut as well.
    assert machine.product_seconds(Product(144, 16, 1 << 17), torch.float32) > 0
    assert {(144, 16)} == {(p.m, p.n) for p, _ in machine.products if p.m == 144}
    # A depthwise convolution has negligible arithmetic.
    assert machine.product_seconds(Product(4096, 1, 9, 128), torch.float32) == 0
