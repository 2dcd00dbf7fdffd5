"""DKD, DIST and standardised logits in the methods: the published numbers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import Method, MethodLoss, Progress, create_method
from fastokd.methods.divergence import Divergence, standardised
from fastokd.recipe.names import recipe

GOLDENS = Path(__file__).parents[1] / "goldens"
OPTIONS = {"dkd": ("alpha", "beta"), "dist": ("beta", "gamma")}
CASES = [(name, case) for name in OPTIONS for case in "ab"]


def golden(name: str, case: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}_{case}.npz") as file:
        return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in file.items()}


def shape_of(students: int, classes: int, sharing: str = "network") -> CohortShape:
    trunk = 16 if sharing == "branch" else None
    return CohortShape(students, classes, sharing, (16,) * students, trunk, ((),) * students)


def loss_of(
    method: Method, logits_SBC: Tensor, labels_B: Tensor, teacher_BC: Tensor, epoch: float = 0.0
) -> MethodLoss:
    out = CohortOutput(logits_SBC, (), (), None, teacher_BC[None])
    progress = Progress(torch.tensor(epoch), torch.ones((), dtype=torch.float64))
    return method.double()(out, labels_B, progress)


def near(found: Tensor, wanted: Any) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("between", ["teacher", "peers", "pairs"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_losses(name: str, case: str, between: str) -> None:
    of = golden(name, case)
    S, _, C = of["logits_SBC"].shape
    options = {key: of[key] for key in ("temperature", *OPTIONS[name])}
    weight = of.get("warm", of.get("kd_loss_weight"))
    if between == "teacher":
        own = {"warmup": float(of["warmup"])} if name == "dkd" else {"kd_weight": weight}
        method = create_method(name, shape_of(S, C), **options, **own)
    else:
        own = {"divergence": name, "kd_weight": weight}
        mix = "logits" if between == "peers" else "pairwise"
        method = create_method("dml", shape_of(S, C), mix=mix, **options, **own)
    z_SBC = of["logits_SBC"].clone().requires_grad_()
    loss = loss_of(method, z_SBC, of["labels_B"], of["teacher_logits_BC"], of.get("epoch", 1) - 1)
    (gradient,) = torch.autograd.grad(loss.total, z_SBC)
    near(loss.parts["ce_S"], of["ce_S"])
    if between == "teacher":
        first, second = ("tckd_S", "nckd_S") if name == "dkd" else ("inter_S", "intra_S")
        a, b = OPTIONS[name]
        near(loss.parts["kd_S"], of[a] * of[first] + of[b] * of[second])
        near(loss.total, of["total"])
        near(gradient, of["grad_logits"])
    else:
        near(loss.parts["kd_S"], of[f"{between}_kd_S"])
        near(loss.total, of[f"{between}_total"])
        near(gradient, of[f"grad_{between}"])


def test_the_warm_up_is_full_after_its_epochs() -> None:
    of = golden("dkd", "a")
    given = of["logits_SBC"], of["labels_B"], of["teacher_logits_BC"]
    S, _, C = of["logits_SBC"].shape

    def term(epoch: float, warmup: float) -> float:
        loss = loss_of(create_method("dkd", shape_of(S, C), warmup=warmup), *given, epoch)
        return float((loss.total - loss.parts["ce_S"].sum()) / loss.parts["kd_S"].sum())

    assert term(0, 20) == pytest.approx(0.05)
    assert term(19, 20) == term(200, 20) == term(0, 0) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_a_student_without_a_target_has_no_term(name: str) -> None:
    z_SBC = torch.randn(2, 4, 10).requires_grad_()
    scores_SS = torch.tensor([[-torch.inf, 0.0], [-torch.inf, -torch.inf]])
    for mix in ("logits", "pairwise"):
        divergence = Divergence(name, mix=mix)
        total, kd_S = divergence.by_scores(z_SBC, None, scores_SS, torch.arange(4), 2.0)
        (gradient_SBC,) = torch.autograd.grad(total, z_SBC)
        assert kd_S[0] > 0
        assert kd_S[1] == 0
        assert gradient_SBC[0].any()
        assert not gradient_SBC[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["dkd", "dist", "kl"])
def test_a_source_to_which_nobody_listens_may_be_nan(name: str, bad: float) -> None:
    """As if it weren't there: for both students, and for a row of scores a sample."""
    z_SBC, labels_B = torch.randn(2, 4, 10).double().requires_grad_(), torch.arange(4)
    scores_SN = torch.tensor([[-torch.inf, 1.0, 0.0], [2.0, -torch.inf, 0.0]]).double()
    hidden_SN = torch.cat([scores_SN, torch.full((2, 1), -torch.inf)], 1)
    extra_EBC = torch.stack([torch.randn(4, 10), torch.full((4, 10), bad)]).double()
    for mix in ("logits", "pairwise"):
        divergence = Divergence(name, mix=mix, standardise=name == "kl")
        found = []
        for scores, extras in ((scores_SN, extra_EBC[:1]), (hidden_SN, extra_EBC)):
            for given in (scores, scores.expand(4, -1, -1)) if mix == "logits" else (scores,):
                total, _ = divergence.by_scores(z_SBC, extras, given, labels_B, 2.0)
                found.append((total.detach(), *torch.autograd.grad(total, z_SBC)))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"divergence": "dkd"}, {"standardise_logits": True}])
def test_a_term_apart_obeys_the_ramp(options: dict[str, Any]) -> None:
    cohort = Cohort(("resnet8", 2), 10)
    out, labels_B = cohort(torch.randn(4, 3, 8, 8)), torch.randint(10, (4,))
    method = create_method("cl_ilr", cohort.shape, **options)
    for ramp in (0.0, 0.5):
        loss = method(out, labels_B, Progress.start(ramp=ramp))
        wanted = loss.parts["ce_S"].sum() + ramp * loss.parts["kd_S"].sum()
        torch.testing.assert_close(loss.total.detach(), wanted.to(loss.total.dtype))
        assert loss.parts["kd_S"].min() > 0


def test_standardised_logits_have_no_mean_and_scale() -> None:
    z_SBC = torch.randn(2, 3, 7).double()
    z_scores = standardised(5.0 * z_SBC + 3.0)
    torch.testing.assert_close(z_scores, standardised(z_SBC), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z_scores.std(-1), torch.ones(2, 3).double())
    same = torch.zeros(1, 2, 5, requires_grad=True)
    standardised(same).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


REFUSED = [
    ("dml", {"divergence": "jsd"}, "choose kl, dkd or dist"),
    ("dml", {"alpha": 1.0}, "alpha is 1.0, but divergence is 'kl'.*set divergence to dkd"),
    ("kd", {"divergence": "dkd", "gamma": 2.0}, "gamma is 2.0.*leave it out, or .* dist"),
    ("dml", {"divergence": "dist", "mix": "probs"}, "choose logits or pairwise"),
    ("dml", {"standardise_logits": True, "mix": "probs"}, "choose logits or pairwise"),
    ("dml", {"divergence": "dkd", "beta": -1.0}, "beta must be a finite number"),
    ("okddip", {"divergence": "dkd"}, "attention learns .* use okddip_mean"),
    ("okddip_no_two_level", {"standardise_logits": True}, "attention learns"),
    ("dkd", {"divergence": "kl"}, "leave it out, or use kd"),
    ("dist", {"divergence": "dkd"}, "leave it out, or use kd"),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_refused_options(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        create_method(name, shape_of(3, 10), **options)


def test_dkd_refuses_mixed_labels() -> None:
    with pytest.raises(UserError, match="dkd takes no mixed labels"):
        recipe("dkd/resnet8/digits", mixup=0.2)
    with pytest.raises(UserError, match="takes no mixed labels"):
        recipe("dml/resnet8/digits", mixup=0.2, divergence="dkd")
    assert recipe("dml/resnet8/digits", mixup=0.2, divergence="dist").mixup == 0.2
    method = create_method("dml", shape_of(2, 10), divergence="dkd")
    out = CohortOutput(torch.randn(2, 4, 10), (), (), None, None)
    labels_B = torch.randint(10, (4,))
    progress = Progress(torch.zeros(()), torch.ones(()), mixed_with=(labels_B, torch.rand(4)))
    with pytest.raises(UserError, match="labels are mixed"):
        method(out, labels_B, progress)


def test_pairs_need_scores_of_the_whole_batch() -> None:
    method = create_method("okddip_random", shape_of(3, 10), divergence="dkd", mix="pairwise")
    out = CohortOutput(torch.randn(3, 4, 10), (), (), None, None)
    progress = Progress.start()
    progress.draws = method.draw(4, torch.Generator())
    with pytest.raises(UserError, match=r"scores differ between samples.*set mix to logits"):
        method(out, torch.randint(10, (4,)), progress)


def test_published_recipes() -> None:
    r = recipe("dkd/resnet32/cifar100")
    assert r.method_options == {"temperature": 4.0, "alpha": 1.0, "beta": 2.0, "warmup": 20.0}
    assert (r.teacher, r.students) == ("baseline/resnet110_basic/cifar100", 1)
    assert (r.lr, r.batch_size, r.epochs, r.milestones) == (0.05, 64, 240, (150, 180, 210))
    assert not r.nesterov
    assert recipe("dkd/wrn_40_1_basic/cifar100").method_options["beta"] == 6.0
    assert r.with_epochs(24).method_options["warmup"] == 2.0
    r = recipe("dkd/resnet18/imagenet")
    assert r.method_options == {"temperature": 1.0, "alpha": 1.0, "beta": 0.5, "warmup": 1.0}
    assert (r.lr, r.batch_size, r.epochs, r.milestones) == (0.2, 512, 100, (30, 60, 90))
    r = recipe("dist/resnet18/imagenet")
    assert (r.lr, r.batch_size, r.nesterov, r.decay_norms) == (0.1, 256, True, False)
    assert r.method_options["kd_weight"] == 2.0
    assert recipe("dist/resnet20/cifar100").method_options["temperature"] == 4.0
