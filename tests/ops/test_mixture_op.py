"""The fused loss as an operator: registration, autograd, compilation, dispatch, bad arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.errors import UserError
from fastokd.ops import _library, cpp, fused_loss, mixture_distillation
from tests.ops.mixture_cases import draw

pytestmark = pytest.mark.usefixtures("cpp_ops")
OP = torch.ops.fastokd.mixture_distillation.default


def arguments(
    S: int = 3, B: int = 4, C: int = 10, E: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of the operator, in its order."""
    case = draw(S, B, C, E, dtype=dtype)
    return {
        "logits_SBC": case.logits_SBC.clone(),
        "extra_EBC": case.extra_EBC,
        "labels_B": case.labels_B,
        "scores": case.scores,
        "key_BPd": None,
        "ce_weight_S": None,
        "kd_weight_S": torch.ones(S),
        "mixture_ce_weight_S": None,
        "temperature_0d": torch.tensor(3.0),
        "ce_weight": 1.0,
        "kd_weight": 1.0,
        "mixture_ce_weight": 0.0,
        "temperature": 1.0,
        "mix": "logits",
        "detach_targets": False,
        "label_smoothing": 0.0,
        "grad_logits": True,
        "grad_extra": True,
        "grad_scores": True,
        "grad_key": False,
        "labels2_B": None,
        "share2_B": None,
        "sample_weight_B": None,
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asks", [(True, True, True), (False, False, False)])
def test_opcheck(dtype: torch.dtype, asks: tuple[bool, bool, bool]) -> None:
    args = arguments(dtype=dtype) | dict(
        zip(("grad_logits", "grad_extra", "grad_scores"), asks, strict=True)
    )
    torch.library.opcheck(OP, tuple(args.values()))
    unbatched = args | {"extra_EBC": None, "scores": torch.zeros(3, 3)}
    unbatched["logits_SBC"] = unbatched["logits_SBC"].requires_grad_()
    torch.library.opcheck(OP, tuple(unbatched.values()))
    mixed = {"labels2_B": torch.ones(4, dtype=torch.long), "share2_B": torch.rand(4)}
    torch.library.opcheck(OP, tuple((args | mixed | {"sample_weight_B": torch.rand(4)}).values()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits_SBC": torch.zeros(3, 4)}, "logits_SBC has 2 dimensions"),
        ({"logits_SBC": torch.zeros(3, 4, 10, dtype=torch.float64)}, "logits_SBC is Double"),
        ({"logits_SBC": torch.zeros(3, 10, 4).mT}, "stride 4 between classes"),
        ({"logits_SBC": torch.zeros(0, 4, 10)}, "from 1 to 16 sources"),
        ({"logits_SBC": torch.zeros(16, 4, 10)}, "from 1 to 16 sources"),
        ({"logits_SBC": torch.zeros(3, 4, 10).to_sparse()}, "(?s).*[Ss]parse"),
        ({"extra_EBC": torch.zeros(1, 4, 11)}, "extra_EBC has shape"),
        ({"extra_EBC": torch.zeros(1, 5, 10)}, "extra_EBC has shape"),
        ({"extra_EBC": torch.zeros(4, 10)}, "extra_EBC has 2 dimensions"),
        ({"labels_B": torch.zeros(5, dtype=torch.long)}, "labels_B has shape"),
        ({"labels_B": torch.zeros(4)}, "class ids must be integers"),
        ({"labels_B": torch.zeros(4, 9)}, "labels_B has shape"),
        ({"labels_B": torch.zeros(4, 10, dtype=torch.long)}, "labels_B is Long"),
        ({"labels_B": torch.tensor(1)}, "labels_B has shape"),
        ({"scores": torch.zeros(3, 3)}, "scores has shape"),
        ({"scores": torch.zeros(3, 4, 4)}, "scores has shape"),
        ({"scores": torch.zeros(4)}, "scores has shape"),
        ({"scores": torch.zeros(3, 4, dtype=torch.long)}, "scores is Long"),
        ({"kd_weight_S": torch.ones(2)}, "kd_weight_S has shape"),
        ({"ce_weight_S": torch.ones(3, 1)}, "ce_weight_S has shape"),
        ({"temperature_0d": torch.ones(3)}, "temperature_0d must be a scalar"),
        ({"mix": "means"}, "mix is means"),
        ({"labels2_B": torch.zeros(4, dtype=torch.long)}, "must be given together"),
        ({"share2_B": torch.zeros(4)}, "must be given together"),
        ({"labels2_B": torch.zeros(4), "share2_B": torch.zeros(4)}, "class ids must be integers"),
        ({"labels2_B": torch.zeros(5).long(), "share2_B": torch.zeros(4)}, "labels2_B has shape"),
        ({"labels2_B": torch.tensor(1), "share2_B": torch.zeros(4)}, "labels2_B has shape"),
        ({"labels2_B": torch.zeros(4).long(), "share2_B": torch.zeros(5)}, "share2_B has shape"),
        (
            {"labels2_B": torch.zeros(4).long(), "share2_B": torch.zeros(4).long()},
            "share2_B is Long",
        ),
        (
            {
                "labels_B": torch.rand(4, 10),
                "labels2_B": torch.zeros(4).long(),
                "share2_B": torch.zeros(4),
            },
            "labels2_B mixes class ids",
        ),
        ({"sample_weight_B": torch.ones(4, 1)}, "sample_weight_B has shape"),
        ({"sample_weight_B": torch.ones(3)}, "sample_weight_B has shape"),
    ],
)
def test_the_operator_checks_what_it_is_given(change: dict[str, object], says: str) -> None:
    """Called past the public function it raises; it never reads what isn't there."""
    call = tuple((arguments() | change).values())
    with pytest.raises(RuntimeError, match=says):
        OP(*call)


def test_a_weight_is_its_number_times_its_tensor() -> None:
    """And so is the temperature; the public function has only ever one of the two."""
    names = ("ce_weight_S", "kd_weight_S", "mixture_ce_weight_S", "temperature_0d")
    tensors = [torch.tensor(x) for x in ([1.0, 0.5, 2.0], 0.7, 0.3, 2.5)]
    numbers = {"ce_weight": 0.5, "kd_weight": 0.25, "mixture_ce_weight": 2.0, "temperature": 0.5}
    products = [x * number for x, number in zip(tensors, numbers.values(), strict=True)]
    found = OP(*(arguments() | dict(zip(names, tensors, strict=True)) | numbers).values())
    ones = dict.fromkeys(numbers, 1.0)
    expected = OP(*(arguments() | dict(zip(names, products, strict=True)) | ones).values())
    torch.testing.assert_close(found, expected)


def test_a_number_may_lie_on_the_cpu_beside_tensors_on_meta() -> None:
    args = arguments() | {"kd_weight_S": torch.tensor(0.5)}
    where = {
        name: x.to("meta") if isinstance(x, Tensor) and x.dim() else x for name, x in args.items()
    }
    *losses, gradients = OP(*where.values())
    assert all(x.is_meta for x in (*losses, *gradients))
    where["scores"] = args["scores"]
    with pytest.raises(UserError, match="mixture_distillation has tensors on meta and others"):
        OP(*where.values())


@pytest.fixture(params=["cpp", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C++ operator, and by Triton's way to a launcher the same."""
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(_library.LAUNCHERS, "mixture_distillation", OP)
    name: str = request.param
    return name


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case = draw(3, 4, 10, 1, dtype=dtype)
    assert case.extra_EBC is not None
    return (
        case.logits_SBC.requires_grad_(),
        case.extra_EBC.requires_grad_(),
        case.scores.requires_grad_(),
        case.labels_B,
    )


def total(z: Tensor, extra: Tensor, scores: Tensor, labels_B: Tensor, **options: Any) -> Tensor:
    """The loss; ``options`` hold the implementation."""
    return mixture_distillation(z, labels_B, scores, extra_logits_EBC=extra, **options).total


def test_every_subset_of_gradients(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    full = torch.autograd.grad(total(z, extra, scores, labels_B, impl=impl), [z, extra, scores])
    for asks in itertools.product([False, True], repeat=3):
        chosen = [
            x.detach().requires_grad_(asked)
            for x, asked in zip((z, extra, scores), asks, strict=True)
        ]
        loss = total(*chosen, labels_B, impl=impl)
        assert loss.requires_grad == any(asks)
        wanted = [x for x in chosen if x.requires_grad]
        expected = [x for x, asked in zip(full, asks, strict=True) if asked]
        found = torch.autograd.grad(loss, wanted) if wanted else ()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_detached_targets_have_no_gradient(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    gradients = torch.autograd.grad(
        total(z, extra, scores, labels_B, detach_targets=True, impl=impl),
        [z, extra, scores],
        allow_unused=True,
    )
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)
    assert not total(
        z.detach(), extra, scores, labels_B, detach_targets=True, impl=impl
    ).requires_grad


def test_no_grad_and_inference(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    with torch.no_grad():
        assert not total(z, extra, scores, labels_B, impl=impl).requires_grad
    with torch.inference_mode():
        assert total(z, extra, scores, labels_B, impl=impl).isfinite()


def test_a_retained_graph_gives_the_same_gradient_again(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    loss = total(z, extra, scores, labels_B, impl=impl)
    first = torch.autograd.grad(loss, [z, scores], retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(7)  # what the caller does with its gradient is its own affair
    scaled = torch.autograd.grad(loss * 2, [z, scores], retain_graph=True)
    second = torch.autograd.grad(loss, [z, scores])
    for once, twice, again in zip(kept, scaled, second, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(2 * once, twice)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_steps_own_unit_gradient_is_not_multiplied_by(impl: str, dtype: torch.dtype) -> None:
    """With the bits of the product; casts are one operator. The number itself isn't looked at."""
    unit = fused_loss.unit_gradient(torch.zeros(()))

    def gradients(incoming: Tensor, weight: float = 1.0) -> tuple[list[Tensor], list[str]]:
        z, extra, scores, labels_B = leaves(dtype)
        loss = total(z, extra, scores, labels_B, impl=impl)
        loss = loss if weight == 1.0 else loss * weight
        with Names() as names:
            found = torch.autograd.grad(loss, [z, extra, scores], incoming)
        return [x.clone() for x in found], names.seen

    (one, seen), (product, _) = gradients(unit), gradients(torch.ones(()))
    for x, y in zip(one, product, strict=True):
        assert torch.equal(x, y)
    if impl != "torch":
        assert set(seen) <= {"empty_like", "_foreach_copy_"}
        assert seen.count("_foreach_copy_") == (dtype == torch.float16)  # two float32 gradients
    for other in (gradients(unit, 3.0)[0], gradients(torch.tensor(3.0))[0]):
        for x, y in zip(other, one, strict=True):
            torch.testing.assert_close(x, 3 * y)
    assert unit == 1.0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_unit_gradient_that_a_hook_changes_is_multiplied_by(
    impl: str, shape: tuple[int, ...]
) -> None:
    """It has the shape of the total, which may be [1]."""
    z, extra, scores, labels_B = leaves()
    found = []
    for factor in (1, 3):
        loss = total(z, extra, scores, labels_B, impl=impl)
        loss.register_hook(lambda grad, factor=factor: grad.mul_(factor) if factor > 1 else grad)
        loss = loss.reshape(shape) if shape else loss
        found.append(torch.autograd.grad(loss, z, fused_loss.unit_gradient(loss))[0].clone())
    torch.testing.assert_close(found[1], 3 * found[0])


class Names(TorchDispatchMode):
    """Which operators run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [] if func.is_view else [func._schema.name.split("::")[1]]
        return func(*args, **(kwargs or {}))


def test_the_unit_gradient_of_a_retained_graph_leaves_its_gradients_alone(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    unit = fused_loss.unit_gradient(torch.zeros(()))
    loss = total(z, extra, scores, labels_B, impl=impl)
    first = torch.autograd.grad(loss, [z, scores], unit, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(7)
    for once, again in zip(kept, torch.autograd.grad(loss, [z, scores], unit), strict=True):
        assert torch.equal(once, again)


def test_gradients_accumulate(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    for _ in range(3):
        total(z, extra, scores, labels_B, impl=impl).backward()
    (once,) = torch.autograd.grad(total(z, extra, scores, labels_B, impl=impl), [z])
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 3 * once)


def test_a_second_derivative_is_refused(impl: str) -> None:
    z, extra, scores, labels_B = leaves()
    (gradient,) = torch.autograd.grad(
        total(z, extra, scores, labels_B, impl=impl), [z], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative: impl='torch' has"):
        (gradient.square().sum() + z.sum()).backward()


def test_half_precision_survives_the_grad_scaler(impl: str) -> None:
    """At B 256, C 1,000 most gradients are below fp16's smallest number until they are scaled."""
    case = draw(4, 256, 1000, dtype=torch.float16, incoming=65536.0, asks=(True, False, False))
    case = replace(case, logits_SBC=4 * case.logits_SBC, kd_weight=0.001)
    ours, exact = case.run(impl)["grad_logits"], case.double().run("torch")["grad_logits"]
    unscaled = (exact / 65536.0).half()
    assert (unscaled == 0).float().mean() > 0.3
    assert (ours == 0).float().mean() < 0.01
    error = (ours.double() - exact).square().mean().sqrt()
    assert error < 1e-3 * exact.square().mean().sqrt()


def test_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(z: Tensor, extra: Tensor, scores: Tensor, labels_B: Tensor, w: Tensor) -> Tensor:
        loss = mixture_distillation(
            z, labels_B, scores, extra_logits_EBC=extra, kd_weight=w, temperature=2.0, impl="cpp"
        )
        return loss.total * 3 + loss.kd_S.sum()

    monkeypatch.setattr(cpp, "_library", None)  # the search for the library isn't traced
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    z, extra, scores, labels_B = leaves(torch.bfloat16)
    for w in (torch.tensor(0.3), torch.tensor(0.9)):
        wanted = torch.autograd.grad(step(z, extra, scores, labels_B, w), [z, extra, scores])
        loss = compiled(z, extra, scores, labels_B, w)
        for found, exact in zip(torch.autograd.grad(loss, [z, extra, scores]), wanted, strict=True):
            torch.testing.assert_close(found, exact)


def test_auto_takes_what_it_can_and_says_why_not() -> None:
    z, _, scores, labels_B = leaves()
    scores = scores[..., :3].detach()

    def refused(reason: str, **change: Any) -> None:
        call = {"logits_SBC": z, "labels_B": labels_B, "scores": scores} | change
        with pytest.raises(UserError, match=reason):
            mixture_distillation(**call, impl="cpp")
        mixture_distillation(**call)

    grad_fn = mixture_distillation(z, labels_B, scores).total.grad_fn
    assert grad_fn is not None
    assert type(grad_fn).__name__ == "FusedLossBackward", "auto takes the C++"
    refused("float64", scores=scores.double())
    refused("10 elements apart", logits_SBC=torch.zeros(3, 4, 100)[..., ::10])
    refused("17 sources", logits_SBC=torch.zeros(17, 4, 10), scores=torch.zeros(17, 17))
    refused("labels_B asks for gradient", labels_B=torch.rand(4, 10, requires_grad=True))


BAD = {
    "a weight with a gradient": {"kd_weight": torch.tensor(0.5, requires_grad=True)},
    "a temperature with a gradient": {"temperature": torch.tensor(2.0, requires_grad=True)},
    "a temperature of 0": {"temperature": 0.0},
    "no temperature": {"temperature": math.nan},
    "smoothing of 1": {"label_smoothing": 1.0},
    "smoothing below 0": {"label_smoothing": -0.1},
    "another mix": {"mix": "logs"},
    "a weight of another length": {"ce_weight": torch.ones(2)},
    "soft labels of other classes": {"labels_B": torch.rand(4, 9)},
    "labels that are numbers": {"labels_B": torch.rand(4)},
    "second labels that are numbers": {"mixed_with": (torch.rand(4), torch.rand(4))},
    "shares of another length": {"mixed_with": (torch.zeros(4).long(), torch.rand(3))},
    "weights of samples with a gradient": {"sample_weight_B": torch.ones(4, requires_grad=True)},
    "scores of others": {"scores": torch.zeros(3, 5)},
    "scores that are whole": {"scores": torch.zeros(3, 3, dtype=torch.long)},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_call_that_has_passed_lets_no_other_through(change: dict[str, Any]) -> None:
    """Its signature is not checked again: whatever the checks read is part of it."""
    z, _, _, labels_B = leaves()
    call = {"logits_SBC": z, "labels_B": labels_B, "scores": torch.zeros(3, 3)}
    for impl in ("cpp", "torch"):
        for _ in range(2):
            assert mixture_distillation(**call, impl=impl).total.requires_grad
            with pytest.raises(UserError):
                mixture_distillation(**call | change, impl=impl)


def test_a_call_with_mixed_labels_lets_no_other_through() -> None:
    z, _, _, labels_B = leaves()
    call = {"logits_SBC": z, "labels_B": labels_B, "scores": torch.zeros(3, 3), "impl": "cpp"}
    right = (torch.zeros(4).long(), torch.rand(4))
    for wrong in ((torch.zeros(4), torch.rand(4)), (right[0], torch.rand(5))):
        assert mixture_distillation(**call, mixed_with=right).total.requires_grad
        with pytest.raises(UserError):
            mixture_distillation(**call, mixed_with=wrong)


def test_mixed_labels_compile_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(z: Tensor, labels_B: Tensor, labels2_B: Tensor, share2_B: Tensor) -> Tensor:
        scores = torch.zeros(3, 3)
        with_two = (labels2_B, share2_B)
        return mixture_distillation(z, labels_B, scores, mixed_with=with_two, impl="cpp").total

    monkeypatch.setattr(cpp, "_library", None)  # the search for the library isn't traced
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    z, _, _, labels_B = leaves()
    for share2 in (0.3, 0.8):
        call = (z, labels_B, labels_B.roll(1), torch.full((4,), share2))
        (wanted,) = torch.autograd.grad(step(*call), z)
        (found,) = torch.autograd.grad(compiled(*call), z)
        torch.testing.assert_close(found, wanted)


def test_a_signature_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(fused_loss, "_routes", {})
    monkeypatch.setattr(fused_loss, "check", checks.append)
    z, _, _, labels_B = leaves()
    for _ in range(3):
        mixture_distillation(z, labels_B, torch.zeros(3, 3), kd_weight=torch.rand(3))
    assert len(checks) == 1
    for temperature in range(1, 200):
        mixture_distillation(z, labels_B, torch.zeros(3, 3), temperature=temperature)
    assert len(fused_loss._routes) <= 64


def test_threads_change_nothing() -> None:
    case = draw(4, 67, 300, 1, batched=False)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(case.run("cpp"))
    torch.set_num_threads(before)
    for found in results[1:]:
        for name, x in found.items():
            assert torch.equal(x, results[0][name])


def test_denormals_stay_on() -> None:
    """A library linked with -ffast-math would turn them off for the whole process."""
    assert cpp.load() is None
    assert torch.tensor(1e-40).mul(1.0).item() > 0
    assert math.ldexp(1.0, -1074) > 0
