"""Ten steps with the C++ ops stay as near to float64 as ten steps in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.data import Augment, load_dataset, stream_of
from fastokd.methods import Progress, create_method


def ten_steps(method_name: str, impl: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The leader's parameters after 10 steps on the digits, and the losses on the way."""
    data = load_dataset("digits")
    sharing = "network" if method_name == "ffsd" else "branch"
    torch.manual_seed(0)
    cohort = Cohort(
        ("resnet8", 3), 10, sharing=sharing, impl=impl, mean=data.mean, std=data.std, seed=0
    )
    method = create_method(method_name, cohort.shape, impl=impl)
    cohort.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.to(dtype)
    stream = stream_of(data.train, 12, seed=0, augment=Augment(2), shuffle=True)
    optimizer = torch.optim.SGD(
        [*cohort.parameters(), *method.parameters()], lr=0.002, momentum=0.9, nesterov=True
    )
    losses = []
    for step in range(10):
        images_BHWC, labels_B = stream.batch(*divmod(step, 8))
        loss = method(cohort(images_BHWC), labels_B, Progress.start())
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.detach().double())
    leader = [p.detach().double().flatten() for p in cohort.students[-1].parameters()]
    return torch.cat(leader), torch.stack(losses)


@pytest.mark.usefixtures("cpp_ops")
@pytest.mark.parametrize("method", ["okddip", "ffsd"])
def test_cpp_is_as_near_to_float64_as_torch_is(method: str) -> None:
    exact, exact_losses = ten_steps(method, "torch", torch.float64)
    plain, plain_losses = ten_steps(method, "torch", torch.float32)
    fast, fast_losses = ten_steps(method, "auto", torch.float32)
    assert not torch.equal(plain, fast)  # the fast path did run

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    # Rounding errors of ten steps grow alike, not equally: twice the plain path's is the budget.
    assert rms(fast - exact) <= 2 * rms(plain - exact) + 1e-6 * rms(exact)
    assert rms(fast_losses - exact_losses) <= 2 * rms(plain_losses - exact_losses) + 1e-5
