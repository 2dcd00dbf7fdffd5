"""MCL's contrasts: the published code's numbers, a plain loop, anchors alone, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops import mutual_contrast
from fastokd.reference.mcl import contrasts
from tests.conftest import golden

TERMS = ("vcl", "soft_vcl", "icl", "soft_icl")


def embedded(g: dict[str, Tensor], students: int) -> Tensor:
    """The goldens' embeddings, ``[S, B, E]``."""
    hidden = [
        F.relu(F.linear(g["features_SBD"][s], g["embed_weight1"][s], g["embed_bias1"][s]))
        for s in range(students)
    ]
    e_SBE = torch.stack(
        [F.linear(hidden[s], g["embed_weight2"][s], g["embed_bias2"][s]) for s in range(students)]
    )
    return e_SBE / e_SBE.norm(dim=-1, keepdim=True)


def normalised(S: int, B: int, D: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(S, B, D, dtype=dtype), dim=-1)


@pytest.mark.parametrize("name", ["mcl_a", "mcl_b"])
def test_the_terms_are_the_published_codes(name: str) -> None:
    g = golden(name)
    ours = mutual_contrast(
        embedded(g, len(g["ce_S"])),
        g["labels_B"],
        tau=float(g["tau"]),
        temperature=float(g["temperature"]),
    )
    for term in TERMS:
        torch.testing.assert_close(getattr(ours, term), g[term], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("S", "labels"),
    [
        (1, [0, 0, 1, 1]),
        (2, [0, 1, 0, 1, 0]),
        (3, [2, 2, 5, 7, 7]),  # 5 is alone
        (3, [0, 1, 2]),  # each is alone
        (2, [3, 3]),
    ],
)
def test_values_and_gradients_are_the_plain_loops(S: int, labels: list[int]) -> None:
    labels_B, weights = torch.tensor(labels), torch.tensor([0.3, 0.7, 1.1, 0.4]).double()
    e_SBD = normalised(S, len(labels)).requires_grad_()
    ours = mutual_contrast(e_SBD, labels_B, tau=0.2, temperature=2.0)
    theirs = list(contrasts(list(e_SBD), labels_B, 0.2, 2.0).values())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        for term, weight in ((mine, weights[0]), (other, weights[0])):
            assert torch.isfinite(
                torch.autograd.grad(term * weight, e_SBD, retain_graph=True)[0]
            ).all()
    grads = [
        torch.autograd.grad((torch.stack(list(terms)) * weights).sum(), e_SBD)[0]
        for terms in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("B", [0, 1])
def test_a_batch_without_pairs_has_no_contrast(B: int) -> None:
    e_SBD = normalised(2, B).requires_grad_()
    terms = mutual_contrast(e_SBD, torch.zeros(B, dtype=torch.long))
    torch.stack(list(terms)).sum().backward()
    assert all(term == 0 for term in terms)
    assert e_SBD.grad is not None
    assert (e_SBD.grad == 0).all()


def test_low_precision_is_computed_in_fp32() -> None:
    e_SBD, labels_B = normalised(2, 6, dtype=torch.float32).bfloat16(), torch.arange(6) // 2
    with torch.autocast("cpu", torch.bfloat16):
        ours = mutual_contrast(e_SBD, labels_B)
    exact = mutual_contrast(e_SBD.double(), labels_B)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tau": 0.0}, "tau is 0.0: it must be a finite number above 0"),
        ({"temperature": math.inf}, "temperature is inf: it must be a finite number above 0"),
        ({"impl": "cpp"}, "impl='cpp': its similarities are a few megabytes"),
        ({"impl": "triton"}, "impl='triton': its similarities are a few megabytes"),
        ({"impl": "fast"}, "impl is 'fast': choose auto"),
        (
            {"embeddings_SBD": torch.randn(4, 5)},
            r"embeddings_SBD is torch.float32 of shape \[4, 5\]",
        ),
        ({"labels_B": torch.randn(4)}, "labels_B is torch.float32 of shape"),
        ({"labels_B": torch.zeros(3, dtype=torch.long)}, r"it must be integers \[4\]"),
    ],
)
def test_wrong_calls_are_named(changes: dict[str, object], says: str) -> None:
    given = {"embeddings_SBD": normalised(2, 4), "labels_B": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(UserError, match=says):
        mutual_contrast(**{**given, **changes})  # type: ignore[arg-type]
