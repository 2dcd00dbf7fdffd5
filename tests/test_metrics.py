"""Exact counts: against sums written out, over ragged batches, and against NaN."""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional as F

from fastokd.metrics import Meter, label_rank


def test_matches_sums_written_out_over_ragged_batches() -> None:
    S, B, C = 4, 23, 11
    logits_SBC = torch.randn(S, B, C)
    labels_B = torch.randint(C, (B,))
    loss_B = torch.rand(B)
    meter = Meter(S, has_leader=True)
    for start, stop in ((0, 10), (10, 20), (20, 23)):
        meter.update(
            logits_SBC[:, start:stop], labels_B[start:stop], {"loss": loss_B[start:stop].mean()}
        )
    result = meter.result()

    right_S = [(z.argmax(1) == labels_B).double().mean().item() for z in logits_SBC]
    assert torch.allclose(torch.tensor(result["student_top1"]), torch.tensor(right_S))
    assert result["leader_top1"] == result["student_top1"][-1]
    assert math.isclose(result["mean_top1"], sum(right_S) / S)
    five = [
        (z.topk(5).indices == labels_B[:, None]).any(1).double().mean().item() for z in logits_SBC
    ]
    assert torch.allclose(torch.tensor(result["student_top5"]), torch.tensor(five))

    probs_PBC = F.softmax(logits_SBC[:3], dim=2)
    assert math.isclose(
        result["ensemble_top1"], (probs_PBC.mean(0).argmax(1) == labels_B).double().mean().item()
    )
    by_logits = (logits_SBC[:3].mean(0).argmax(1) == labels_B).double().mean().item()
    assert math.isclose(result["ensemble_logits_top1"], by_logits)
    distances = [(a - b).norm(dim=1).mean() for a, b in itertools.combinations(probs_PBC, 2)]
    assert math.isclose(result["diversity"], torch.stack(distances).mean().item(), rel_tol=1e-6)
    assert math.isclose(result["loss"], loss_B.mean().item(), rel_tol=1e-6)


def test_without_a_leader_every_student_is_a_peer() -> None:
    logits_SBC = torch.randn(2, 9, 5)
    meter = Meter(2, has_leader=False)
    meter.update(logits_SBC, torch.zeros(9, dtype=torch.long))
    result = meter.result()
    assert result["leader_top1"] is None
    assert result["diversity"] > 0


def test_one_student_has_no_diversity() -> None:
    meter = Meter(1, has_leader=False)
    meter.update(torch.randn(1, 3, 5), torch.zeros(3, dtype=torch.long))
    assert meter.result()["diversity"] is None


def test_nothing_seen_is_nothing_said() -> None:
    assert Meter(1, has_leader=False).result() == {}


def test_nan_and_equal_logits_are_never_right_by_accident() -> None:
    labels_B = torch.tensor([3])
    assert label_rank(torch.full((1, 1, 10), math.nan), labels_B).item() >= 5
    assert label_rank(torch.zeros(1, 1, 10), labels_B).item() == 3
    one_nan = torch.zeros(1, 1, 10)
    one_nan[..., 3], one_nan[..., 4] = 1.0, math.nan
    assert label_rank(one_nan, labels_B).item() == 1
    for no_class in (-1, 10):
        assert label_rank(torch.ones(1, 1, 10), torch.tensor([no_class])).item() == 10


def test_a_meter_set_to_nothing_counts_in_the_same_tensors():
    torch.manual_seed(0)
    logits_SBC, labels_B = torch.randn(2, 9, 4), torch.randint(4, (9,))
    meter = Meter(2, has_leader=False)
    meter.update(logits_SBC, labels_B)
    first, totals = meter.result(), dict(meter.totals)
    meter.set({})
    assert meter.result() == {}
    meter.update(logits_SBC, labels_B)
    assert meter.result() == first
    assert all(meter.totals[name] is value for name, value in totals.items())
