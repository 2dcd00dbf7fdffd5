"""FFSD: who hears whom, what each weight moves, what is refused, and that it trains."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastokd
from fastokd.cohort import Cohort, CohortShape
from fastokd.errors import UserError
from fastokd.learner.step import training_step
from fastokd.methods import Method, Progress, create_method
from fastokd.methods.ffsd import FFSD
from fastokd.models import registry
from fastokd.models.resnet import ResNet
from fastokd.recipe.names import Recipe, recipe
from fastokd.reference import Lambdas, ReferenceFFSD, ffsd_losses
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

MAPS = ((16, 32, 32), (32, 16, 16), (64, 8, 8))


def shape(*maps: tuple[tuple[int, int, int], ...], sharing: str = "network") -> CohortShape:
    widths = tuple(m[-1][0] for m in maps)
    return CohortShape(len(maps), 10, sharing, widths, None, maps)


def cohort_and_method(
    students: int = 3, model: str = "resnet8", **options: float
) -> tuple[Cohort, Method]:
    cohort = Cohort((model, students), 10, sharing="network")
    return cohort, create_method("ffsd", cohort.shape, **options)


def gradients(
    cohort: Cohort, method: Method, ramp: float = 1.0, size: int = 16
) -> dict[str, Tensor]:
    """Of one batch, by name; zeros where nothing arrived. The modules are left as they were."""
    cohort, method = deepcopy(cohort), deepcopy(method)
    generator = torch.Generator().manual_seed(3)
    dtype = next(cohort.parameters()).dtype
    images = torch.randn(8, 3, size, size, generator=generator, dtype=dtype)
    labels_B = torch.randint(10, (8,), generator=generator)
    method(cohort(images), labels_B, Progress.start(ramp=ramp)).total.backward()
    both = [*cohort.named_parameters(), *method.named_parameters()]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in both}


def moved(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    """The networks whose gradients differ."""
    return {
        ".".join(name.split(".")[: 2 if name.startswith(("students", "decoders")) else 1])
        for name, value in first.items()
        if not torch.allclose(value, second[name], rtol=1e-3, atol=1e-9)
    }


def test_scores_say_who_hears_whom() -> None:
    method = FFSD(shape(*[MAPS] * 4))  # three students and the leader
    silent = -torch.inf
    expected = [
        [silent, 0.0, 0.0, silent, silent],
        [0.0, silent, 0.0, silent, silent],
        [0.0, 0.0, silent, silent, silent],
        [silent, silent, silent, silent, 0.0],  # the leader: the fusion module alone
    ]
    assert method.pairs_SN.tolist() == expected
    assert method.fusion_1N.tolist() == [[silent, 0.0, 0.0, 0.0]]
    assert list(method.decoders) == ["1", "2", "leader"]


STUDENTS = {"students.0", "students.1", "students.2"}
DECODERS = {"decoders.1", "decoders.leader"}


@pytest.mark.parametrize(
    ("option", "networks"),
    [
        # The first student has nobody before it; the leader's map losses are all under fusion.
        ("lambda_diversity", {"students.1"}),
        ("lambda_fusion", {"students.2", "transfusion"}),
        ("lambda_self_distillation", DECODERS),
        ("temperature", {*STUDENTS, "fusion"}),
    ],
)
def test_each_weight_moves_its_own_networks(option: str, networks: set[str]) -> None:
    """And no other: every target is detached."""
    options = {"lambda_diversity": 0.5, "lambda_fusion": 5.0, "lambda_self_distillation": 5.0}
    cohort, method = cohort_and_method(**options)
    assert isinstance(method, FFSD)
    before = gradients(cohort, method)
    changed = {**options, "temperature": 2.0}[option] * 2
    setattr(method, option, changed)
    assert moved(before, gradients(cohort, method)) == networks


def test_the_ramp_scales_map_losses_alone() -> None:
    cohort, method = cohort_and_method(lambda_diversity=0.5)
    full, none = gradients(cohort, method), gradients(cohort, method, ramp=0.0)
    assert moved(full, none) == {"students.1", "students.2", "transfusion", *DECODERS}
    for name, gradient in none.items():
        if name.startswith(("decoders", "transfusion")):
            assert not gradient.any(), name
    half = gradients(cohort, method, ramp=0.5)
    torch.testing.assert_close(
        half["transfusion.conv1.weight"], full["transfusion.conv1.weight"] / 2
    )


def test_decoders_teach_on_the_statistics_before_the_step() -> None:
    """Each learns from one batch a step; what it teaches with is read before and left alone."""
    cohort, method = cohort_and_method(students=4)
    method(cohort(torch.randn(4, 3, 16, 16)), torch.arange(4), Progress.start())
    counts = {n: b.item() for n, b in method.named_buffers() if n.endswith("batches_tracked")}
    assert set(counts.values()) == {1}
    decoder = method.decoders["leader"]
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    x_BCHW = torch.randn(2, 64, 4, 4)
    taught = decoder.decode(x_BCHW)
    assert not any(map_BCHW.requires_grad for map_BCHW in taught)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    evaluated = decoder.eval()(x_BCHW)
    for ours, theirs in zip(taught, evaluated, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_four_stages_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet's students have four maps and so three blocks a decoder: losses and gradients."""
    build = partial(ResNet, blocks=(1, 1, 1, 1), base=4)
    monkeypatch.setitem(registry._SPECS, "small4", registry.ModelSpec("small4", build, 32, ""))
    cohort, method = cohort_and_method(model="small4")
    cohort.double()
    method.double()
    assert len(list(method.decoders["leader"].children())) == 3
    reference = ReferenceFFSD("small4", 10).double()
    reference.load_state_dict({**cohort.state_dict(), **method.state_dict()})
    ours = gradients(cohort, method, size=32)

    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(10, (8,), generator=generator)
    losses = ffsd_losses(reference, images, labels_B, Lambdas())
    for loss in (*losses.students, losses.fusion, losses.leader, *losses.decoders.values()):
        loss.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=f"{name} differs"
        )


def test_bf16_autocast_stays_near_fp32() -> None:
    cohort, method = cohort_and_method(lambda_diversity=0.01)
    images, labels_B = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    exact = method(cohort(images), labels_B, Progress.start())
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(cohort(images), labels_B, Progress.start())
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, exact.total, rtol=3e-2, atol=0.0)
    for name, value in loss.parts.items():
        assert not value.requires_grad, name
        torch.testing.assert_close(value, exact.parts[name], rtol=0.2, atol=2e-3, msg=name)
    loss.total.backward()
    for module in (cohort, method):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_what_it_cannot_train_is_refused_with_the_reason() -> None:
    other = ((32, 32, 32), (64, 16, 16), (128, 8, 8))
    with pytest.raises(UserError, match="students of one architecture"):
        FFSD(shape(MAPS, MAPS, other))
    with pytest.raises(UserError, match=r"at least 3 \(a leader"):
        FFSD(shape(MAPS, MAPS))
    with pytest.raises(UserError, match="no branch form"):
        FFSD(shape(*[MAPS] * 3, sharing="branch"))
    with pytest.raises(UserError, match="these have 1"):
        FFSD(shape(*[MAPS[-1:]] * 3))
    odd = ((16, 15, 15), (32, 8, 8))
    with pytest.raises(UserError, match="15 x 15, 8 x 8"):
        FFSD(shape(*[odd] * 3))
    with pytest.raises(UserError, match="lambda_fusion must be a finite number"):
        create_method("ffsd", shape(*[MAPS] * 3), lambda_fusion=float("nan"))
    cohort, method = cohort_and_method()
    tiny = cohort(torch.randn(4, 3, 4, 4))
    with pytest.raises(UserError, match="1 x 1 pixels: its attention needs at least 3"):
        method(tiny, torch.zeros(4, dtype=torch.long), Progress.start())


def test_recipe_is_the_published_one() -> None:
    cifar = recipe("ffsd/resnet32/cifar100")
    assert (cifar.students, cifar.epochs, cifar.milestones) == (3, 300, (150, 225))
    assert (cifar.weight_decay, cifar.batch_size, cifar.crop_mode) == (1e-4, 128, "reflect")
    assert (cifar.ramp_epochs, cifar.ramp_first, cifar.warmup_epochs) == (5.0, 1, 0.0)


def test_warm_up_starts_at_a_fifth_and_scales_with_the_schedule() -> None:
    long = replace(recipe("ffsd/resnet32/cifar100"), warmup_epochs=5.0, milestones=(3, 80))
    assert [long.learning_rate(epoch) for epoch in (0, 1, 4)] == pytest.approx([0.02, 0.04, 0.01])
    assert long.learning_rate(0, warm_up=False) == 0.1
    assert long.learning_rate(4, warm_up=False) == pytest.approx(0.01)
    assert long.with_epochs(600).warmup_epochs == 10.0


def small(**changes: object) -> Recipe:
    return replace(recipe("ffsd/resnet8/digits", epochs=2), **changes)  # type: ignore[arg-type]


def test_optimizers_are_the_published_ones() -> None:
    """SGD for networks, fusion and transfusion; Adam for decoders, which the warm-up passes by."""
    session = build(small(warmup_epochs=4.0, milestones=(1,)), RunOptions(device="cpu"))
    session.epoch = 1
    session.begin_epoch()
    (sgd, adam) = session.learner.optimizers
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adam, torch.optim.Adam)
    assert [group["weight_decay"] for group in sgd.param_groups] == [1e-4, 1e-4, 1e-5]
    assert [float(group["lr"]) for group in sgd.param_groups] == pytest.approx([0.005] * 3)
    (decoders,) = adam.param_groups
    assert (decoders["weight_decay"], float(decoders["lr"])) == (1e-4, pytest.approx(1e-4))
    trained = {p for o in session.learner.optimizers for g in o.param_groups for p in g["params"]}
    modules: list[nn.Module] = [session.learner.cohort, session.learner.method]
    assert trained == {p for module in modules for p in module.parameters()}


@pytest.mark.usefixtures("all_digits")
def test_two_epochs_on_digits(tmp_path: Path) -> None:
    run = fastokd.train(
        small(), out=tmp_path / "run", device="cpu", precision="fp32", engine="loop", quiet=True
    )
    first, last = run.metrics[0]["train"], run.metrics[-1]["train"]
    assert last["loss"] < first["loss"]
    assert last["leader_top1"] > 0.2
    assert last["decoder_maps"] < first["decoder_maps"]
    assert run.last["kd_weight"] == 1.0


def test_a_resumed_session_goes_on_to_the_bit() -> None:
    """Adam's state too."""

    def step(session: Session) -> dict[str, Tensor]:
        session.begin_epoch()
        training_step(session.learner, *session.stream.batch(0, 0))
        return session.state()[0]

    options = RunOptions(device="cpu", precision="fp32")
    first, second = build(small(), options), build(small(), options)
    step(first)
    second.load_state(*first.state())
    theirs = step(second)
    for name, value in step(first).items():
        assert torch.equal(value, theirs[name]), name
    assert "optim.method.decoders.leader.layer0.norm.weight:exp_avg_sq" in theirs
