"""Students side by side: each on a stream of its own, forked, joined, and its tensors held.

There is no GPU: the streams are ``fake_streams.py``'s. ``tests/gpu/test_streams.py`` reads real graphs.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort, Streams
from fastokd.errors import UserError
from fastokd.methods import Progress, create_method
from tests.cohort.fake_streams import FakeCuda, number

COHORTS = {
    "branch": (("resnet8", 3), "branch"),
    "network": (("resnet8", 3), "network"),
    "dropout": (("vgg16", 2), "network"),  # masks are drawn before the fork
    "mixed": (["resnet8", "resnet20"], "network"),
}
METHODS = [("branch", "okddip"), ("network", "ffsd"), ("dropout", "dml"), ("mixed", "dml")]


def forward(
    kind: str, method_name: str, streams: Streams | None, watched: FakeCuda | None = None
) -> dict[str, Tensor]:
    """The losses and gradients of one step, in the order of their making."""
    students, sharing = COHORTS[kind]
    options = {"dropout": 0.5} if kind == "dropout" else {}
    cohort = Cohort(students, 10, sharing=sharing, model_options=options)
    torch.manual_seed(0)
    method = create_method(method_name, cohort.shape).train()
    cohort.set_engine("loop", streams is not None)
    if streams is not None:
        cohort.streams = cohort._run.streams = streams  # type: ignore[attr-defined]
    cohort.train()
    torch.manual_seed(1)
    images_BHWC = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    progress = Progress.start("cpu", dtype=torch.float32)
    with watched or torch.enable_grad():
        loss = method(cohort(images_BHWC), torch.arange(4), progress)
    loss.total.backward()
    found = {"total": loss.total.detach(), **loss.parts}
    for module in (cohort, method):
        found |= {f"grad.{k}": p.grad for k, p in module.named_parameters() if p.grad is not None}
        found |= {f"buffer.{k}": buffer for k, buffer in module.named_buffers()}
    return found


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_streams_are_forked_and_joined(kind: str, method: str) -> None:
    """No op reads what its stream hasn't waited for, and the students don't wait for each other."""
    cuda = FakeCuda()
    students = 3 if kind in ("branch", "network") else 2
    forward(kind, method, Streams(students, cuda), cuda)
    assert cuda.races == []
    names = [f"student {s}" for s in range(students)]
    fork, join = [(name, "main") for name in names], [("main", name) for name in names]
    assert cuda.waits == (fork + join) * (2 if method == "ffsd" else 1)
    ops = Counter(cuda.ops)
    assert set(ops) == {"main", *names}
    assert all(ops[name] >= 8 for name in names)
    if kind == "network":  # what is left on the main stream: images, logits, losses of logits
        assert ops["main"] < 100, ops


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_what_crosses_streams_is_held_until_the_next_forward(kind: str, method: str) -> None:
    cuda = FakeCuda()
    streams = Streams(3 if kind in ("branch", "network") else 2, cuda)
    forward(kind, method, streams, cuda)
    assert cuda.crossing
    assert cuda.crossing <= {number(x) for x in streams.held}
    assert not any(x.requires_grad for x in streams.held)
    streams.begin()
    assert streams.held == []


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_numbers_are_those_without_streams(kind: str, method: str) -> None:
    """Bit for bit, dropout's draws included."""
    students = 3 if kind in ("branch", "network") else 2
    beside = forward(kind, method, Streams(students, FakeCuda()))
    for key, value in forward(kind, method, None).items():
        assert torch.equal(beside[key], value), key


def test_a_cpu_has_no_streams() -> None:
    streams = Streams(2)
    assert streams.run(torch.add, [(torch.ones(()), 1), (torch.ones(()), 2)]) == [2, 3]
    assert streams.streams == streams.held == []


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_other_engines_have_no_streams(engine: str) -> None:
    cohort = Cohort(("resnet8", 2), 10)
    with pytest.raises(UserError, match=f"engine='{engine}' .* has no streams: use engine='loop'"):
        cohort.set_engine(engine, streams=True)
    assert cohort.engine == "loop"


def test_streams_last_until_the_next_engine() -> None:
    cohort = Cohort(("resnet8", 3), 10, sharing="network")
    cohort.set_engine("loop", streams=True)
    cohort.train_only(range(1, 3), lambda outputs: outputs)
    assert cohort.streams is not None
    assert cohort.streams.count == 2
    cohort.set_engine("grouped")
    assert cohort.streams is None
