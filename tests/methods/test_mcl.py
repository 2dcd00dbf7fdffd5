"""MCL: whole losses of the published code, and what its embeddings and options do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import Method, Progress, create_method
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
