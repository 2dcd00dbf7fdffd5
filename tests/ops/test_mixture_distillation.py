"""The one loss: the published code's numbers, the specification's edges, the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops import mixture_distillation
from tests.conftest import golden
from tests.ops.mixture_cases import assert_second_labels_may_be_out_of_range
from tests.ops.mixture_cases import draw as draw_case

INF = math.inf


def off_diagonal(S: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(S, S, dtype=dtype).fill_diagonal_(-INF)


def close(ours: Tensor, theirs: Tensor, tol: float = 1e-9) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tol, atol=tol)


def okddip_scores(query_BPd: Tensor, key_BPd: Tensor) -> Tensor:
    """Peers attend to peers; the leader listens to every peer alike; nobody to the leader."""
    scores_BPP = query_BPd @ key_BPd.mT
    B, P, _ = scores_BPP.shape
    scores_BSN = torch.full((B, P + 1, P + 1), -INF, dtype=scores_BPP.dtype)
    scores_BSN[:, :P, :P] = scores_BPP
    scores_BSN[:, P, :P] = 0
    return scores_BSN


@pytest.mark.parametrize(
    ("suffix", "tol_total", "tol_grad"), [("", 1e-9, 1e-9), ("_published_eps", 1e-3, 5e-6)]
)
class TestGoldens:
    """The published loss heads; with their 1e-7 on the targets we agree within FIDELITY's bound."""

    def test_okddip(self, suffix: str, tol_total: float, tol_grad: float) -> None:
        g = golden(f"okddip_loss{suffix}")
        peers, leader, q, k = (
            g[n].requires_grad_()
            for n in ("peer_logits_PBC", "leader_logits_BC", "query_BPd", "key_BPd")
        )
        loss = mixture_distillation(
            torch.cat([peers, leader[None]]),
            g["labels_B"],
            okddip_scores(q, k),
            kd_weight=g["kd_weight"],
            temperature=g["temperature"],
            impl="torch",
        )
        loss.total.backward()
        close(loss.ce_S, g["ce_S"])
        close(loss.kd_S, g["kd_S"], tol_total)
        close(loss.total, g["total"], tol_total)
        for tensor, name in (
            (peers, "peer_logits"),
            (leader, "leader_logits"),
            (q, "query"),
            (k, "key"),
        ):
            assert tensor.grad is not None
            close(tensor.grad, g[f"grad_{name}"], tol_grad)

    @pytest.mark.parametrize("form", ["mean_logits", "pairwise", "pairwise_detached"])
    def test_dml(self, suffix: str, tol_total: float, tol_grad: float, form: str) -> None:
        g = golden(f"dml_loss{suffix}")
        z = g["logits_SBC"].requires_grad_()
        loss = mixture_distillation(
            z,
            g["labels_B"],
            off_diagonal(4),
            temperature=g["temperature"],
            mix="logits" if form == "mean_logits" else "pairwise",
            detach_targets=form.endswith("detached"),
            impl="torch",
        )
        loss.total.backward()
        close(loss.total, g[f"total_{form}"], tol_total)
        assert z.grad is not None
        close(z.grad, g[f"grad_{form}"], tol_grad)

    def test_cl_ilr(self, suffix: str, tol_total: float, tol_grad: float) -> None:
        g = golden(f"cl_ilr_loss{suffix}")
        z = g["logits_SBC"].requires_grad_()
        loss = mixture_distillation(
            z,
            g["labels_B"],
            off_diagonal(4),
            kd_weight=g["kd_weight"],
            temperature=g["temperature"],
            impl="torch",
        )
        loss.total.backward()
        close(loss.total, g["total"], tol_total)
        assert z.grad is not None
        close(z.grad, g["grad_logits"], tol_grad)

    def test_one(self, suffix: str, tol_total: float, tol_grad: float) -> None:
        g = golden(f"one_loss{suffix}")
        z, gate = g["logits_SBC"].requires_grad_(), g["gate_scores_BS"].requires_grad_()
        loss = mixture_distillation(
            z,
            g["labels_B"],
            gate[:, None].expand(-1, 4, -1),
            kd_weight=g["kd_weight"],
            mixture_ce_weight=[1.0, 0.0, 0.0, 0.0],
            temperature=g["temperature"],
            impl="torch",
        )
        loss.total.backward()
        close(loss.total, g["total"], tol_total)
        assert z.grad is not None
        assert gate.grad is not None
        close(z.grad, g["grad_logits"], tol_grad)
        close(gate.grad, g["grad_gate_scores"], tol_grad)


def draw(
    S: int = 3, B: int = 4, C: int = 7, E: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(S * 1000 + B * 100 + C + E)
    x = {
        "logits_SBC": 2 * torch.randn(S, B, C, generator=g, dtype=dtype),
        "labels_B": torch.randint(C, (B,), generator=g),
        "scores": torch.randn(B, S, S + E, generator=g, dtype=dtype),
    }
    if E:
        x["extra_logits_EBC"] = 2 * torch.randn(E, B, C, generator=g, dtype=dtype)
    return x


@pytest.mark.parametrize("mix", ["logits", "probs", "pairwise"])
class TestSpecification:
    @pytest.mark.parametrize("detach", [False, True])
    @pytest.mark.parametrize("E", [0, 2])
    def test_gradients(self, mix: str, detach: bool, E: int) -> None:
        x = draw(E=E)
        leaves = [x[n].requires_grad_() for n in x if n != "labels_B"]

        def total(*tensors: Tensor) -> Tensor:
            logits, scores, *extra = tensors
            return mixture_distillation(
                logits,
                x["labels_B"],
                scores,
                extra_logits_EBC=extra[0] if extra else None,
                ce_weight=torch.tensor([1.0, 0.5, 2.0]),
                kd_weight=0.7,
                mixture_ce_weight=[0.3, 0.0, 1.0],
                temperature=2.5,
                mix=mix,  # type: ignore[arg-type]
                label_smoothing=0.1,
                impl="torch",
            ).total

        if detach:
            loss = mixture_distillation(**x, mix=mix, detach_targets=True, impl="torch")  # type: ignore[arg-type]
            grads = torch.autograd.grad(loss.total, leaves, allow_unused=True)
            assert grads[1] is None  # scores reach the loss through the target alone
            assert all(g is None for g in grads[2:])
        else:
            assert torch.autograd.gradcheck(total, leaves)

    def test_unheard_source_may_be_nan(self, mix: str) -> None:
        """Student 2 is NaN, nobody listens to it and it listens to nobody."""
        x = draw()
        x["scores"][:, :, 2] = -INF
        x["scores"][:, 2] = -INF
        clean = mixture_distillation(**x, mix=mix, impl="torch")  # type: ignore[arg-type]
        x["logits_SBC"][2] = math.nan
        z, scores = x["logits_SBC"].requires_grad_(), x["scores"].requires_grad_()
        loss = mixture_distillation(**x, mix=mix, mixture_ce_weight=1.0, impl="torch")  # type: ignore[arg-type]
        close(loss.kd_S, clean.kd_S)
        assert loss.ce_S.isnan().tolist() == [False, False, True]
        grad_z, grad_scores = torch.autograd.grad(loss.total, [z, scores])
        assert grad_z[:2].isfinite().all()
        assert grad_scores.isfinite().all()

    def test_row_without_sources_has_no_target(self, mix: str) -> None:
        x = draw()
        x["scores"][:, 1] = -INF
        scores = x["scores"].requires_grad_()
        z = x["logits_SBC"].requires_grad_()
        loss = mixture_distillation(
            **x, mix=mix, mixture_ce_weight=1.0, ce_weight=0.0, impl="torch"
        )  # type: ignore[arg-type]
        assert loss.kd_S[1] == 0
        grad_z, grad_scores = torch.autograd.grad(loss.total, [z, scores])
        assert grad_scores.isfinite().all()
        assert (grad_scores[:, 1] == 0).all()
        assert grad_z.isfinite().all()

    def test_empty_batch_is_zero(self, mix: str) -> None:
        x = draw(B=0)
        z = x["logits_SBC"].requires_grad_()
        loss = mixture_distillation(**x, mix=mix, mixture_ce_weight=1.0, impl="torch")  # type: ignore[arg-type]
        loss.total.backward()
        assert loss.total == 0
        assert z.grad is not None

    def test_shift_changes_nothing(self, mix: str) -> None:
        x = draw()
        before = mixture_distillation(**x, mix=mix, impl="torch").total  # type: ignore[arg-type]
        x["logits_SBC"] = x["logits_SBC"] + 100
        close(mixture_distillation(**x, mix=mix, impl="torch").total, before)  # type: ignore[arg-type]

    def test_saturated_logits_stay_finite(self, mix: str) -> None:
        x = draw()
        z = (x["logits_SBC"] * 1e4).requires_grad_()
        loss = mixture_distillation(z, x["labels_B"], x["scores"], mix=mix, impl="torch")  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(loss.total, z)
        assert loss.total.isfinite()
        assert grad.isfinite().all()


def test_label_out_of_range_is_nan_for_its_sample() -> None:
    x = draw()
    x["labels_B"][1] = 99
    z = x["logits_SBC"].requires_grad_()
    loss = mixture_distillation(**x, impl="torch")
    (grad,) = torch.autograd.grad(loss.total, z)
    assert loss.total.isnan()
    assert grad[:, 1].isnan().any()
    assert grad[:, [0, 2, 3]].isfinite().all()


def test_soft_labels_are_hard_ones_where_one_hot() -> None:
    x = draw()
    hard = mixture_distillation(**x, label_smoothing=0.1, impl="torch")
    x["labels_B"] = torch.nn.functional.one_hot(x["labels_B"], 7).double()
    close(mixture_distillation(**x, label_smoothing=0.1, impl="torch").total, hard.total)


def test_cross_entropy_is_torchs() -> None:
    x = draw()
    loss = mixture_distillation(**x, label_smoothing=0.2, impl="torch")
    theirs = [
        torch.nn.functional.cross_entropy(z, x["labels_B"], label_smoothing=0.2)
        for z in x["logits_SBC"]
    ]
    close(loss.ce_S, torch.stack(theirs))


def random_case(seed: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments with mixed labels, the labels as ``[B, C]`` with their weight, and the weights ``[B]``."""
    g = torch.Generator().manual_seed(seed)
    S, B, C = (int(torch.randint(1, most, (), generator=g)) for most in (5, 7, 20))
    labels_B, labels2_B = (torch.randint(C, (B,), generator=g) for _ in range(2))
    share2_B = torch.rand(B, generator=g, dtype=torch.float64)
    share2_B[0] = seed % 3 / 2
    weight_B = 2 * torch.rand(B, generator=g, dtype=torch.float64)
    one_hot, one_hot2 = (F.one_hot(x, C).double() for x in (labels_B, labels2_B))
    soft_BC = (1 - share2_B)[:, None] * one_hot + share2_B[:, None] * one_hot2
    call: dict[str, Any] = {
        "logits_SBC": 3 * torch.randn(S, B, C, generator=g, dtype=torch.float64),
        "labels_B": labels_B,
        "scores": torch.randn(B, S, S, generator=g, dtype=torch.float64),
        "mixed_with": (labels2_B, share2_B),
        "mixture_ce_weight": 0.7,
        "mix": ("logits", "probs", "pairwise")[seed % 3],
        "label_smoothing": (0.0, 0.1)[seed % 2],
        "impl": "torch",
    }
    return call, soft_BC, weight_B


@pytest.mark.parametrize("seed", range(60))
def test_mixed_labels_are_the_soft_labels_that_they_stand_for(seed: int) -> None:
    call, soft_BC, weight_B = random_case(seed)
    z = call["logits_SBC"].requires_grad_()
    ours = mixture_distillation(**call)
    theirs = mixture_distillation(**call | {"labels_B": soft_BC, "mixed_with": None})
    for x, y in zip(ours, theirs, strict=True):
        close(x, y)
    grads = [torch.autograd.grad(loss.total, z)[0] for loss in (ours, theirs)]
    close(*grads)
    # Two calls of torch's own, one for each label.
    smoothing, (labels2_B, share2_B) = call["label_smoothing"], call["mixed_with"]

    def ce(labels_B: Tensor) -> Tensor:
        per_sample = [
            F.cross_entropy(x, labels_B, label_smoothing=smoothing, reduction="none") for x in z
        ]
        return torch.stack(per_sample)

    mixed_SB = (1 - share2_B) * ce(call["labels_B"]) + share2_B * ce(labels2_B)
    close(ours.ce_S, mixed_SB.mean(1))
    weighted = mixture_distillation(**call, sample_weight_B=weight_B)
    close(weighted.ce_S, (weight_B * mixed_SB).mean(1))
    close(weighted.kd_S, ours.kd_S)


def test_a_weight_of_a_sample_is_in_the_mixtures_cross_entropy_too() -> None:
    call, _, weight_B = random_case(1)
    B = len(weight_B)
    of_weight = {"ce_weight": 0.0, "kd_weight": 0.0}

    def total(weight_B: Tensor | None) -> Tensor:
        return mixture_distillation(**call | of_weight, sample_weight_B=weight_B).total

    parts = [total(F.one_hot(torch.tensor(b), B).double()) for b in range(B)]
    close(torch.stack(parts).sum(), total(None))
    close((weight_B * torch.stack(parts)).sum(), total(weight_B))


def test_gradients_of_mixed_labels() -> None:
    call, _, weight_B = random_case(5)
    leaves = [call[name].requires_grad_() for name in ("logits_SBC", "scores")]

    def total(z: Tensor, scores: Tensor) -> Tensor:
        changed = call | {"logits_SBC": z, "scores": scores}
        return mixture_distillation(**changed, sample_weight_B=weight_B).total

    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("mix", ["logits", "probs", "pairwise"])
def test_second_label_out_of_range(mix: str) -> None:
    case = draw_case(3, 4, 10, mix=mix, mixed=True)
    assert_second_labels_may_be_out_of_range(case, "torch")


def test_gradient_keeps_each_inputs_dtype() -> None:
    x = draw(E=1, dtype=torch.float32)
    z = x["logits_SBC"].bfloat16().requires_grad_()
    scores = x["scores"].requires_grad_()
    extra = x["extra_logits_EBC"].half().requires_grad_()
    loss = mixture_distillation(z, x["labels_B"], scores, extra_logits_EBC=extra, impl="torch")
    loss.total.backward()
    assert loss.total.dtype == loss.ce_S.dtype == torch.float32
    for leaf in (z, scores, extra):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": torch.tensor([1.0])}, "0-d tensor"),
        ({"kd_weight": torch.ones(3, requires_grad=True)}, "kd_weight asks for gradient"),
        ({"ce_weight": [1.0, 2.0]}, "ce_weight has shape"),
        ({"mix": "means"}, "'means'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"scores": torch.zeros(3, 4)}, "scores is"),
        ({"labels_B": torch.zeros(5, dtype=torch.long)}, "labels_B is"),
        ({"labels_B": torch.zeros(4)}, "labels_B is"),
        ({"extra_logits_EBC": torch.zeros(1, 4, 8)}, "extra_logits_EBC has shape"),
        ({"logits_SBC": torch.zeros(4, 7)}, "logits_SBC is"),
        ({"mixed_with": (torch.zeros(5, dtype=torch.long), torch.zeros(4))}, "labels2_B is"),
        ({"mixed_with": (torch.zeros(4), torch.zeros(4))}, "labels2_B is"),
        ({"mixed_with": (torch.zeros(4, dtype=torch.long), torch.zeros(3))}, "share2_B is"),
        ({"mixed_with": (torch.zeros(4).long(), torch.zeros(4).long())}, "share2_B is"),
        (
            {"mixed_with": (torch.zeros(4).long(), torch.zeros(4, requires_grad=True))},
            "share2_B asks for gradient",
        ),
        (
            {"labels_B": torch.rand(4, 7), "mixed_with": (torch.zeros(4).long(), torch.zeros(4))},
            "mixed_with is given beside soft labels",
        ),
        ({"sample_weight_B": torch.ones(3)}, "sample_weight_B is"),
        ({"sample_weight_B": torch.ones(4, requires_grad=True)}, "sample_weight_B asks"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
        ({"impl": "triton"}, "needs a GPU"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        mixture_distillation(**{**draw(), **change})  # type: ignore[arg-type]
