"""A view per student: every engine against a plain loop over networks with images of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.models import Student, create_model

S, B, SIZE = 3, 4, 16
ENGINES = ("loop", "grouped", "vmap")


def built(sharing: str, name: str = "resnet8", **options: Any) -> Cohort:
    return Cohort((name, S), 10, sharing=sharing, **options).double()


def drawn(views: int = S, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(views, B, 3, SIZE, SIZE, generator=generator, dtype=dtype)


def scalar(logits: list[Tensor], features: list[Tensor], maps: list[Tensor]) -> Tensor:
    """A loss that weighs every number of every output differently."""
    total = torch.zeros((), dtype=torch.float64)
    for x in (*logits, *features, *maps):
        weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape)
        total = total + (x * weights).square().sum() / x.numel()
    return total


def ours(cohort: Cohort, engine: str, views: Tensor) -> dict[str, Tensor]:
    cohort = copy.deepcopy(cohort)
    cohort.set_engine(engine)
    out = cohort.train()(views)
    maps = [m for student in out.maps for m in student]
    scalar(list(out.logits_SBC), list(out.features), maps).backward()
    found = {f"grad.{k}": p.grad for k, p in cohort.named_parameters() if p.grad is not None}
    found |= {f"state.{k}": v.double() for k, v in cohort.state_dict().items()}
    return found | {f"logits.{s}": x.detach() for s, x in enumerate(out.logits_SBC)}


def plain(cohort: Cohort, views: Tensor, trunk_views: str = "each") -> dict[str, Tensor]:
    """Published modules one after another; nothing of the engines, nor of the views' split."""
    cohort = copy.deepcopy(cohort).train()
    students = [one for one in cohort.students if isinstance(one, Student)]
    read = list(views)
    before: list[tuple[Tensor, ...]] = [()] * S
    if cohort.trunk is not None:
        stop = cohort.branch_from
        if trunk_views == "each":
            pairs = [cohort.trunk.trunk(x, stop) for x in views]
            read, before = [x for x, _ in pairs], [maps for _, maps in pairs]
        else:
            x, maps = cohort.trunk.trunk(views.reshape(-1, *views.shape[2:]), stop)
            read = [x[v * B : (v + 1) * B] for v in range(S)]
            before = [tuple(m[v * B : (v + 1) * B] for m in maps) for v in range(S)]
    outs = [
        student.outputs(x, cohort.branch_from) for student, x in zip(students, read, strict=True)
    ]
    every = [m for first, out in zip(before, outs, strict=True) for m in (*first, *out.maps)]
    scalar([o.logits_BC for o in outs], [o.features_BD for o in outs], every).backward()
    found = {f"grad.{k}": p.grad for k, p in cohort.named_parameters() if p.grad is not None}
    found |= {f"state.{k}": v.double() for k, v in cohort.state_dict().items()}
    return found | {f"logits.{s}": out.logits_BC.detach() for s, out in enumerate(outs)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9 * scale, msg=key)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["resnet8", "densenet_40_12"])
def test_networks_with_a_view_each(name: str, engine: str) -> None:
    cohort = built("network", name)
    same(ours(cohort, engine, drawn()), plain(cohort, drawn()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trunk_views", ["each", "all"])
def test_branches_with_a_view_each(trunk_views: str, engine: str) -> None:
    cohort = built("branch", trunk_views=trunk_views)
    same(ours(cohort, engine, drawn()), plain(cohort, drawn(), trunk_views))


def test_the_trunk_counts_a_batch_a_view_or_one_for_all() -> None:
    counts = {}
    for trunk_views in ("each", "all"):
        cohort = built("branch", trunk_views=trunk_views).train()
        cohort(drawn())
        counts[trunk_views] = cohort.state_dict()["trunk.bn1.num_batches_tracked"]
    assert counts == {"each": S, "all": 1}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_equal_views_are_a_shared_batch(sharing: str, engine: str) -> None:
    """In eval mode, where nothing depends on how often a norm has run."""
    cohort = built(sharing).eval()
    cohort.set_engine(engine)
    batch = drawn()[0]
    torch.testing.assert_close(
        cohort(batch.expand(S, *batch.shape)).logits_SBC,
        cohort(batch).logits_SBC,
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_mixed_cohort_has_a_view_each() -> None:
    cohort = Cohort(["resnet8", "wrn_16_2"], 10, sharing="network").double().eval()
    views = drawn(2)
    out = cohort(views)
    for s in range(2):
        alone = cohort.student(s).double().eval()
        torch.testing.assert_close(out.logits_SBC[s], alone(views[s]), rtol=1e-9, atol=1e-9)


def test_uint8_views_are_normalised_in_one_pass() -> None:
    cohort = built("network").float().eval()
    pixels = torch.randint(256, (S, B, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.profiler.profile() as profile:
        found = cohort(pixels).logits_SBC
    assert [e.name for e in profile.events()].count("aten::addcmul") == 1
    for s in range(S):
        torch.testing.assert_close(found[s], cohort(pixels[s]).logits_SBC[s])


def test_a_teacher_reads_the_last_view() -> None:
    teacher = create_model("resnet8", 10).double().eval()
    cohort = built("network", teacher=teacher)
    views = drawn(S + 1)
    out = cohort(views)
    assert out.extra_logits_EBC is not None
    torch.testing.assert_close(out.extra_logits_EBC[0], teacher(views[S]))
    with pytest.raises(UserError, match=r"hold 3 views for 3 students and a teacher: give \[4, B"):
        cohort(drawn(S))


def test_the_trunks_output_is_the_mean_over_views() -> None:
    cohort = built("branch").eval()
    views = drawn()
    out = cohort(views)
    assert out.trunk_BCHW is not None
    each = [cohort(x).trunk_BCHW for x in views]
    torch.testing.assert_close(out.trunk_BCHW, torch.stack(each).mean(0))


def test_a_wrong_number_of_views_is_refused() -> None:
    with pytest.raises(UserError, match=r"hold 2 views for 3 students: give \[3, B, ...\]"):
        built("network")(drawn(2))
    with pytest.raises(UserError, match="trunk_views is 'both': choose each or all"):
        built("branch", trunk_views="both")


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_engines_take_views_in_bf16(engine: str) -> None:
    cohort = built("network").float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = cohort(drawn(dtype=torch.float32)).logits_SBC
        cohort.set_engine(engine)
        found = cohort(drawn(dtype=torch.float32)).logits_SBC
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_a_method_trains_on_views_with_every_engine() -> None:
    """Three steps of a compiled-free method loss: the engines end with the same weights."""

    def trained(engine: str) -> dict[str, Tensor]:
        cohort = built("branch")
        cohort.set_engine(engine)
        optimizer = torch.optim.SGD(cohort.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            logits_SBC = cohort.train()(drawn()).logits_SBC
            nn.functional.cross_entropy(
                logits_SBC.flatten(0, 1), torch.arange(B).repeat(S)
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {k: v.double() for k, v in cohort.state_dict().items()}

    wanted = trained("loop")
    for engine in ("grouped", "vmap"):
        same(trained(engine), wanted)
