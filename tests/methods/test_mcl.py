"""MCL: whole losses of the published code, and what its embeddings and options do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import INDEX, Method, Progress, create_method
from fastokd.methods.mcl_memory import Memory
from tests.conftest import golden


def shape_of(g: dict[str, Tensor]) -> CohortShape:
    S, _, D = g["features_SBD"].shape
    C = g["logits_SBC"].shape[-1]
    return CohortShape(S, C, "network", (D,) * S, None, ((),) * S)


def fill(method: Method, g: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sets the embeddings to the golden's; returns their gradients' golden by parameter."""
    expected = {}
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            _, student, layer, kind = name.split(".")
            key = f"embed_{kind}{1 if layer == '0' else 2}"
            parameter.copy_(g[key][int(student)])
            expected[name] = g[f"grad_{key}"][int(student)]
    return expected


@pytest.mark.parametrize(("name", "logit_distill"), [("mcl_a", True), ("mcl_b", False)])
def test_the_loss_is_the_published_codes(name: str, logit_distill: bool) -> None:
    g = golden(name)
    numbers = ("tau", "alpha", "gamma", "beta", "lam", "temperature")
    options: dict[str, Any] = {key: float(g[key]) for key in numbers}
    method = create_method(
        "mcl",
        shape_of(g),
        embedding_dim=g["embed_weight1"].shape[1],
        logit_distill=logit_distill,
        **options,
    ).double()
    expected = fill(method, g)
    logits_SBC, features_SBD = g["logits_SBC"].requires_grad_(), g["features_SBD"].requires_grad_()
    out = CohortOutput(logits_SBC, tuple(features_SBD), (), None, None)
    loss = method(out, g["labels_B"], Progress.start())
    loss.total.backward()
    torch.testing.assert_close(loss.total, g["total"], rtol=1e-9, atol=0)
    for key in ("ce_S", "kd_S", "vcl", "soft_vcl", "icl", "soft_icl"):
        torch.testing.assert_close(loss.parts[key], g[key], rtol=1e-9, atol=0)
    expected |= {"logits": g["grad_logits"], "features": g["grad_features"]}
    grads = {n: p.grad for n, p in method.named_parameters()}
    grads |= {"logits": logits_SBC.grad, "features": features_SBD.grad}
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_its_numbers_are_refused_where_they_are_given() -> None:
    shape = CohortShape(2, 10, "network", (8, 8), None, ((), ()))
    with pytest.raises(UserError, match="tau is 0: it must be a finite number above 0"):
        create_method("mcl", shape, tau=0)
    with pytest.raises(UserError, match="embedding_dim must be a whole number, at least 1"):
        create_method("mcl", shape, embedding_dim=0)
    with pytest.raises(UserError, match="trains at least 2"):
        create_method("mcl", CohortShape(1, 10, "network", (8,), None, ((),)))


def test_students_of_several_widths_have_embeddings_of_one() -> None:
    shape = CohortShape(2, 10, "network", (8, 12), None, ((), ()))
    method = create_method("mcl", shape, embedding_dim=4)
    out = CohortOutput(
        torch.randn(2, 6, 10), (torch.randn(6, 8), torch.randn(6, 12)), (), None, None
    )
    loss = method(out, torch.arange(6) // 2, Progress.start())
    assert torch.isfinite(loss.total)
    assert all(loss.parts[name] > 0 for name in ("vcl", "soft_vcl", "icl", "soft_icl"))


def test_the_memory_form_is_the_published_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    g = golden("mcl_memory_a")
    S, B, _ = g["features_SBD"].shape
    g["logits_SBC"] = torch.zeros(S, B, 10).double()
    numbers = ("tau", "alpha", "gamma", "beta", "lam", "temperature", "memory_momentum")
    method = create_method(
        "mcl",
        shape_of(g),
        form="memory",
        embedding_dim=g["memory_SNE"].shape[-1],
        negatives=g["neg_idx"].shape[1],
        **{key: float(g[key]) for key in numbers},
    )
    rows_BK = torch.cat([g["pos_idx"], g["neg_idx"]], dim=1)
    out, progress = with_memory(method, g, rows_BK, g["pos_idx"][:, 0], monkeypatch)
    expected = fill(method.double(), g)
    loss = method(out, torch.zeros(B, dtype=torch.long), progress)
    ce = loss.parts["ce_S"].sum()
    torch.testing.assert_close(loss.total - ce, g["total"], rtol=1e-9, atol=0)
    for key in ("vcl", "soft_vcl", "icl", "soft_icl"):
        torch.testing.assert_close(loss.parts[key], g[key], rtol=1e-9, atol=0)
    loss.total.backward()
    grads = {n: p.grad for n, p in method.named_parameters()} | {"features": g["features_SBD"].grad}
    for key, value in (expected | {"features": g["grad_features"]}).items():
        torch.testing.assert_close(grads[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert torch.equal(method.memory.memory_SND, g["memory_SNE"])
    method.keep(loss.kept, progress, torch.zeros(()))
    new_SNE = method.state_dict()["memory.memory_SND"]
    torch.testing.assert_close(new_SNE, g["new_memory_SNE"], rtol=1e-9, atol=1e-12)


def test_mcl_okd_is_the_published_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    g = golden("mcl_okd_a")
    numbers = ("tau", "temperature", "memory_momentum")
    method = create_method(
        "mcl",
        shape_of(g),
        form="okd",
        embedding_dim=g["memory_SNE"].shape[-1],
        negatives=g["contrast_index"].shape[1] - 1,
        nce=float(g["beta"]),
        **{key: float(g[key]) for key in numbers},
    )
    own_first = g["contrast_index"]
    rows_BK = torch.cat([own_first[:, :1], own_first[:, :1], own_first[:, 1:]], dim=1)
    g["logits_SBC"].requires_grad_()
    out, progress = with_memory(method, g, rows_BK, g["index_B"], monkeypatch)
    method.double()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            _, student, _, kind = name.split(".")
            parameter.copy_(g[f"embed_{kind}"][int(student)])
    loss = method(out, g["labels_B"], progress)
    loss.total.backward()
    torch.testing.assert_close(loss.total, g["total"], rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.parts["nce"], g["nce"], rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.parts["ce_S"], g["ce_S"], rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.parts["kd_S"][-1], g["kd_last"], rtol=1e-9, atol=0)
    grads = {"logits": g["logits_SBC"].grad, "features": g["features_SBD"].grad}
    for key, grad in grads.items():
        torch.testing.assert_close(grad, g[f"grad_{key}"], rtol=1e-9, atol=1e-12, msg=key)
    for kind in ("weight", "bias"):
        mine = torch.stack([getattr(embed[0], kind).grad for embed in method.embeddings])
        torch.testing.assert_close(mine, g[f"grad_embed_{kind}"], rtol=1e-9, atol=1e-12)
    assert torch.equal(method.memory.memory_SND, g["memory_SNE"])
    method.keep(loss.kept, progress, torch.zeros(()))
    new_SNE = method.state_dict()["memory.memory_SND"]
    torch.testing.assert_close(new_SNE, g["new_memory_SNE"], rtol=1e-9, atol=1e-12)


def with_memory(
    method: Method,
    g: dict[str, Tensor],
    rows_BK: Tensor,
    index_B: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[CohortOutput, Progress]:
    """The golden's memory and its rows in place of drawn ones; an output of its features."""
    N = g["memory_SNE"].shape[1]
    method.start(torch.arange(N) % 3, torch.Generator().manual_seed(0))
    method.memory.memory_SND = g["memory_SNE"].clone()
    monkeypatch.setattr(Memory, "rows", lambda *_: rows_BK)
    progress = Progress.start()
    progress.draws = {INDEX: index_B}
    features = tuple(g["features_SBD"].requires_grad_())
    return CohortOutput(g["logits_SBC"], features, (), None, None), progress


def test_an_image_is_contrasted_with_its_class_and_with_others() -> None:
    labels_N = torch.tensor([0] * 5 + [1] * 30 + [2] * 1 + [4] * 14)
    labels_N = labels_N[torch.randperm(50, generator=torch.Generator().manual_seed(2))]
    memory = Memory(2, 4, negatives=40, momentum=0.5)
    memory.start(labels_N, torch.Generator().manual_seed(0))
    assert memory.memory_SND.shape == (2, 50, 4)
    assert memory.memory_SND.abs().max() <= 0.75**0.5
    index_B = torch.arange(50).repeat(20)
    draws = memory.draw(1000, torch.Generator().manual_seed(1)) | {INDEX: index_B}
    draws["negative_BK"][0, 0] = draws["positive_B"][0] = 1.0 - 2**-24  # the largest draw
    rows_BK = memory.rows(draws, labels_N[index_B])
    own_B = labels_N[index_B]
    assert torch.equal(rows_BK[:, 0], index_B)
    assert torch.equal(labels_N[rows_BK[:, 1]], own_B)
    assert (rows_BK[:, 1] != index_B)[own_B != 2].all()  # another image, where there is one
    assert (labels_N[rows_BK[:, 2:]] != own_B[:, None]).all()
    for label in (0, 1, 2, 4):  # every image of the class and of the others comes
        of_class = rows_BK[own_B == label]
        assert set(of_class[:, 2:].unique().tolist()) == set(
            (labels_N != label).nonzero()[:, 0].tolist()
        )
        assert set(of_class[:, 1].unique().tolist()) == set(
            (labels_N == label).nonzero()[:, 0].tolist()
        )


def test_a_memory_is_refused_where_there_is_none() -> None:
    shape = CohortShape(2, 10, "network", (8, 8), None, ((), ()))
    with pytest.raises(UserError, match="form is 'momery': choose batch, memory or okd"):
        create_method("mcl", shape, form="momery")
    with pytest.raises(UserError, match=r"memory_momentum is 1.0: it must be below 1"):
        create_method("mcl", shape, form="memory", memory_momentum=1.0)
    method = create_method("mcl", shape, form="memory")
    out = CohortOutput(torch.randn(2, 4, 10), (torch.randn(4, 8),) * 2, (), None, None)
    with pytest.raises(
        UserError, match="form is 'memory', but its memory has no images: call start"
    ):
        method(out, torch.zeros(4, dtype=torch.long), Progress.start())
    with pytest.raises(UserError, match="all training images are of one: add images"):
        method.start(torch.ones(9, dtype=torch.long), torch.Generator())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2_basic"])
def test_its_branches_share_one_stage_fewer(name: str) -> None:
    cohort = Cohort((name, 2), 10, model_options={"branch_from": 2}, image_size=8)
    usual = Cohort((name, 2), 10, image_size=8)
    assert cohort.trunk is not None
    assert usual.trunk is not None
    shared, more = (
        {key.split(".")[0] for key in one.trunk.state_dict()} for one in (cohort, usual)
    )
    assert more - shared == {"layer2"}
    assert "layer1" in shared
    whole = cohort.student(1).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(whole(images), cohort.eval()(images).logits_SBC[1])
    for value in (4, "2"):
        with pytest.raises(UserError, match=f"branch_from is {value!r}: it must be a stage after"):
            Cohort((name, 2), 10, model_options={"branch_from": value})
