"""The loss from queries and keys: the published numbers, and the loss from their products."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.ops import mixture_distillation, peer_attention_distillation
from fastokd.ops.peer_attention_distillation import peer_scores
from tests.conftest import golden

OP = torch.ops.fastokd.peer_attention_distillation.default


@pytest.mark.parametrize(("impl", "tol"), [("torch", 1e-9), ("cpp", 3e-6)])
def test_the_published_numbers(impl: str, tol: float, cpp_ops: None) -> None:
    g = golden("okddip_loss")
    dtype = torch.float64 if impl == "torch" else torch.float32
    peers, leader, query, key = (
        g[name].to(dtype).requires_grad_()
        for name in ("peer_logits_PBC", "leader_logits_BC", "query_BPd", "key_BPd")
    )
    loss = peer_attention_distillation(
        torch.cat([peers, leader[None]]),
        g["labels_B"],
        query,
        key,
        kd_weight=g["kd_weight"],
        temperature=g["temperature"],
        impl=impl,
    )
    loss.total.backward()
    found = {"total": loss.total, "ce_S": loss.ce_S, "kd_S": loss.kd_S}
    for name, leaf in (
        ("grad_peer_logits", peers),
        ("grad_leader_logits", leader),
        ("grad_query", query),
        ("grad_key", key),
    ):
        assert leaf.grad is not None
        found[name] = leaf.grad
    for name, x in found.items():
        torch.testing.assert_close(
            x.double(), g[name].double(), rtol=tol, atol=tol * g[name].abs().max().item()
        )


def draw(
    S: int, P: int, C: int, width: int, dtype: torch.dtype = torch.float32, B: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(S * 100 + P + C + width)
    logits_SBC = (2 * torch.randn(S, B, C, generator=g)).to(dtype)
    query_BPd, key_BPd = (
        (torch.randn(B, P, width, generator=g) * width**-0.25).to(dtype) for _ in range(2)
    )
    return logits_SBC, torch.randint(C, (B,), generator=g), query_BPd, key_BPd


# A lone peer, OKDDip's four and eight students; widths of a part of a vector, of one and of more.
@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(("S", "P"), [(1, 1), (2, 1), (4, 3), (4, 4), (8, 7), (16, 15)])
@pytest.mark.parametrize("width", [1, 8, 16, 67])
def test_cpp_is_the_loss_from_the_scores(S: int, P: int, width: int) -> None:
    for mix, dtype in itertools.product(
        ("logits", "probs", "pairwise"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        logits_SBC, labels_B, query, key = draw(S, P, 20, width, dtype)
        leaves = [x.requires_grad_() for x in (logits_SBC, query, key)]
        options = {"kd_weight": 0.7, "mix": mix, "label_smoothing": 0.1}
        ours = peer_attention_distillation(
            logits_SBC,
            labels_B,
            query,
            key,
            impl="cpp",
            **options,  # type: ignore[arg-type]
        )
        wide = [x.detach().double().requires_grad_() for x in leaves]
        exact = peer_attention_distillation(
            wide[0],
            labels_B,
            wide[1],
            wide[2],
            impl="torch",
            **options,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(ours.total.double(), exact.total, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(ours.kd_S.double(), exact.kd_S, rtol=1e-5, atol=3e-6)
        eps = torch.finfo(dtype).eps
        for x, y in zip(
            torch.autograd.grad(ours.total, leaves),
            torch.autograd.grad(exact.total, wide),
            strict=True,
        ):
            assert x.dtype == dtype
            error = (x.double() - y).square().mean().sqrt()
            assert error <= (eps + 1e-6) * y.square().mean().sqrt() + 1e-8


def test_mixed_labels_and_weights_of_samples(cpp_ops: None) -> None:
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    share2_B, labels2_B = torch.linspace(0, 1, 5), labels_B.roll(1)
    options = {
        "mixed_with": (labels2_B, share2_B),
        "sample_weight_B": torch.rand(5),
        "label_smoothing": 0.1,
    }
    wide = [x.double() for x in (logits_SBC, query, key)]
    exact = peer_attention_distillation(wide[0], labels_B, *wide[1:], impl="torch", **options)  # type: ignore[arg-type]
    scores = peer_scores(*wide[1:], 4)
    same = mixture_distillation(wide[0], labels_B, scores, impl="torch", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(exact, same)
    ours = peer_attention_distillation(logits_SBC, labels_B, query, key, impl="cpp", **options)  # type: ignore[arg-type]
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_strided_queries_and_empty_batches(cpp_ops: None) -> None:
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    plain = peer_attention_distillation(logits_SBC, labels_B, query, key, impl="cpp")
    both = torch.stack([query, key], -1)
    strided = peer_attention_distillation(
        logits_SBC, labels_B, both[..., 0], both[..., 1], impl="cpp"
    )
    assert strided.total == plain.total
    empty = [x[:0].requires_grad_() for x in (query, key)]
    loss = peer_attention_distillation(logits_SBC[:, :0], labels_B[:0], *empty, impl="cpp")
    loss.total.backward()
    assert loss.total == 0
    assert empty[0].grad is not None


def test_scores_are_the_papers(cpp_ops: None) -> None:
    """Self is heard, the leader hears every peer alike, nobody hears the leader."""
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    scores = peer_scores(query, key, 4)
    assert torch.equal(scores[:, :3, :3], query @ key.mT)
    assert (scores[:, 3, :3] == 0).all()
    assert scores[:, :, 3].isneginf().all()
    ours = peer_attention_distillation(logits_SBC, labels_B, query, key)
    torch.testing.assert_close(ours, mixture_distillation(logits_SBC, labels_B, scores))


def test_detached_targets(cpp_ops: None) -> None:
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    for x in (logits_SBC, query, key):
        x.requires_grad_()
    loss = peer_attention_distillation(logits_SBC, labels_B, query, key, detach_targets=True)
    loss.total.backward()
    assert logits_SBC.grad is not None
    assert query.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own copies
def test_opcheck(cpp_ops: None) -> None:
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    weights = (None, torch.ones(4), None, torch.tensor(3.0), 1.0, 1.0, 0.0, 1.0)
    for asked in (True, False):
        call = (
            logits_SBC,
            None,
            labels_B,
            query,
            key,
            *weights,
            "logits",
            False,
            0.0,
            *[asked] * 4,
        )
        torch.library.opcheck(OP, call)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query_BPd": torch.zeros(5, 2, 8)}, r"\[5, 4 or 3, width\]"),
        ({"query_BPd": torch.zeros(5, 3)}, "query_BPd has shape"),
        ({"query_BPd": torch.zeros(4, 3, 8)}, "query_BPd has shape"),
        ({"key_BPd": torch.zeros(5, 3, 9)}, "they must be the same"),
        ({"key_BPd": torch.zeros(5, 3, 8, dtype=torch.long)}, "key_BPd is torch.int64"),
        ({"temperature": 0}, "temperature is 0"),
        ({"kd_weight": [1.0]}, "kd_weight has shape"),
        ({"impl": "triton"}, "needs a GPU"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], says: str) -> None:
    names = ("logits_SBC", "labels_B", "query_BPd", "key_BPd")
    call: dict[str, object] = dict(zip(names, draw(4, 3, 10, 8), strict=True))
    with pytest.raises(UserError, match=says):
        peer_attention_distillation(**{**call, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {3: torch.zeros(5, 2, 8)},
        {4: torch.zeros(5, 3, 9)},
        {3: torch.zeros(5)},
        {4: torch.ones(5)},
        {1: torch.zeros(1, 5, 10)},
    ],
)
def test_the_operator_checks_what_it_is_given(change: dict[int, Tensor], cpp_ops: None) -> None:
    logits_SBC, labels_B, query, key = draw(4, 3, 10, 8)
    weights = (None, None, None, None, 1.0, 1.0, 0.0, 3.0)
    call = [logits_SBC, None, labels_B, query, key, *weights, "logits", False, 0.0, *[True] * 4]
    for place, x in change.items():
        call[place] = x
    with pytest.raises(RuntimeError, match=r"query_BPd|key_BPd|peers"):
        OP(*call)
