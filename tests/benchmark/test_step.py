"""``fastokd bench step``: its output and its counts, without any speed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastokd.benchmark.loops import OurLoop
from fastokd.benchmark.step import StepTiming, quartiles, step_flops, step_macs, time_steps
from fastokd.benchmark.worker import Spec, Timed
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.facts import __file__ as FACTS
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions

TINY = "okddip-branch/resnet8/digits"
KEYS = {
    "step_ms",
    "images_per_second",
    "gflops",
    "product_gflops",
    "peak_fraction",
    "instruction_gflops",
    "peak_memory_bytes",
    "engine",
    "impls",
    "device",
    "how",
}


def facts() -> dict[str, dict[str, dict[str, int]]]:
    from pathlib import Path

    found: dict[str, dict[str, dict[str, int]]] = json.loads(
        (Path(FACTS).parent / "students.json").read_text()
    )
    return found


@pytest.mark.parametrize("model", ["resnet32", "resnet110", "wrn_20_8"])
def test_a_branch_cohort_counts_its_trunk_once(model: str) -> None:
    """As published, without the attention's projections: 3 peers, two of feature_dim^2 / 8."""
    whole = facts()["branch_cohorts_of_4_cifar100"][model]["macs"]
    width = facts()["cifar"][model]["feature_dim"]
    macs = step_macs(recipe(f"okddip-branch/{model}/cifar100"))
    assert whole - macs == 3 * 2 * width * width // 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("okddip-network/resnet32/cifar100", 4 * 69130496),
        ("ffsd/resnet56/cifar100", 3 * 125753600),
        ("okddip-network@2/resnet18/imagenet", 2 * 1814073344),
        ("okddip-network/resnet20+resnet32+resnet20/cifar100", 2 * 40818944 + 69130496),
    ],
)
def test_a_network_cohort_counts_every_student(name: str, expected: int) -> None:
    found = recipe(name, batch_size=7)
    assert step_macs(found) == expected
    assert step_flops(found) == 6 * 7 * expected


def test_the_command_prints_the_facts_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    command = [*f"bench step {TINY} --batch-size 4 --steps 2 --threads 1 --json".split()]
    assert run_command([*command, "--precision", "fp32", "--impl", "torch"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found.keys() == KEYS
    assert found["images_per_second"] == pytest.approx(4e3 / found["step_ms"])
    gflops = step_flops(recipe(TINY, batch_size=4)) / found["step_ms"] / 1e6
    assert found["gflops"] == pytest.approx(gflops)
    assert found["peak_fraction"] == pytest.approx(found["gflops"] / found["product_gflops"])
    assert f"of the fp32 product's {found['product_gflops']:.4g} GFLOP/s" in found["how"]
    # At least four students and their gradients; less than a second import of torch.
    assert 1e6 < found["peak_memory_bytes"] < 1e9
    assert found["impls"] == {"mixture_distillation": "torch", "fused_bn_act": "torch"}
    assert found["how"].startswith("measured-cpu: median of 2 steps")
    assert f"{found['engine']}, eager, " in found["how"]
    assert "fp32" in found["how"]


def test_both_loops_in_turn(cpp_ops: None) -> None:
    of = recipe(TINY, batch_size=4)
    ours, theirs = time_steps(
        [Spec(of, threads=1, precision="fp32", engine="grouped"), Spec(of, "reference", threads=1)],
        3,
    )
    assert [len(timing.seconds) for timing in (ours, theirs)] == [3, 3]
    impls = ours.facts["impls"]
    assert (impls["peer_attention_distillation"], impls["fused_bn_act"]) == ("cpp", "cpp")
    # The backward of an op isn't counted as an op.
    assert impls.keys() <= {"conv2d", "fused_bn_act", "peer_attention_distillation"}
    assert ours.facts["precision"] == "fp32"
    assert ours.facts["engine"] == "grouped"
    assert theirs.facts["engine"] == "reference"
    assert theirs.facts["impls"] == {}
    assert theirs.facts["precision"] == "fp32"


def test_images_that_a_run_streams_from_disk_are_drawn() -> None:
    of = recipe("okddip-network@2/resnet18/imagenet", batch_size=2, image_size=64)
    loop = OurLoop(of, RunOptions(engine="loop", precision="fp32", impl="torch"))
    assert loop.images_BHWC.shape == (2, 64, 64, 3)
    assert loop.step().isfinite()


def test_quartiles() -> None:
    timing = StepTiming(Spec(recipe(TINY)), (5.0, 1.0, 2.0, 3.0, 4.0), 1.0, None, 0, {})
    assert timing.median == 3.0
    assert quartiles(timing.seconds) == (2.0, 3.0, 4.0)
    assert quartiles((5.0,)) == (5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "steps is 0: it must be at least 1"),
        ("--threads 0", "threads is 0: it must be at least 1"),
        ("--batch-size 0", "batch_size is 0"),
        ("--students 1", "students is 1"),
    ],
)
def test_bad_input(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "step", TINY, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_worker_hands_on_what_its_loop_refuses() -> None:
    with pytest.raises(UserError, match="sets dropout, which the published loop doesn't take"):
        Timed(Spec(recipe("okddip-branch/vgg16/cifar100", batch_size=2), "reference"))


def test_a_worker_ends_with_its_parent() -> None:
    program = (
        "from fastokd.benchmark.worker import Spec, Timed; from fastokd.recipe.names import recipe;"
        f"worker = Timed(Spec(recipe({TINY!r}, batch_size=2), 'reference', threads=1));"
        "print(worker._process.pid, flush=True); import os; os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    import os
    import time

    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")
