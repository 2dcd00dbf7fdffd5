"""The settings of the loss on labels: what is refused, and what a run's method gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.errors import UserError
from fastokd.learner.label_loss import label_loss_of
from fastokd.methods.label_loss import LabelLoss
from fastokd.recipe.names import list_recipes, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions

NAME = "okddip-branch/resnet8/digits"
QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}


def test_the_default_is_the_plain_cross_entropy() -> None:
    assert all(label_loss_of(recipe(name), 10) is None for name in list_recipes()[:20])
    plain = LabelLoss()
    labels_B = torch.zeros(3).long()
    assert plain.arguments(labels_B, None) == {
        "ce_weight": 1.0,
        "label_smoothing": 0.0,
        "mixed_with": None,
        "sample_weight_B": None,
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0: it must be at least 0 and below 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"ce_weight": -1.0}, "ce_weight is -1.0: it must be a finite number, at least 0"),
        ({"criterion": "mse"}, "criterion is 'mse': choose ce or bce"),
        ({"class_weights": "inverse"}, "class_weights is 'inverse': choose none or balanced"),
        (
            {"target_threshold": 0.2},
            "target_threshold is 0.2, but criterion is ce: set criterion to bce",
        ),
        ({"target_threshold": 1.0, "criterion": "bce"}, "target_threshold is 1.0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(NAME, **changes)


@pytest.mark.parametrize("threshold", [0.005, 0.95])
def test_a_threshold_that_no_label_or_every_label_passes_is_refused(threshold: float) -> None:
    one = recipe(NAME, criterion="bce", target_threshold=threshold, label_smoothing=0.1)
    with pytest.raises(UserError, match=r"the targets of 10 classes are 0\.01 and 0\.91"):
        label_loss_of(one, 10)


def test_a_runs_method_has_them() -> None:
    changes = {"criterion": "bce", "label_smoothing": 0.1, "target_threshold": 0.2}
    one = recipe(NAME, ce_weight=2.5, class_weights="balanced", **changes)
    session = build(one, RunOptions(**QUICK))
    found = session.learner.method.label_loss
    assert (found.smoothing, found.weight, found.threshold) == (0.1, 2.5, 0.2)
    assert found.criterion == "bce"
    assert found.class_weight_C is not None
    counts_C = torch.bincount(session.data.train.labels_N)
    torch.testing.assert_close(found.class_weight_C, counts_C.sum() / (10.0 * counts_C))
    assert len(set(found.class_weight_C.tolist())) > 1
    assert not [name for name in session.state()[0] if "label_loss" in name]


@pytest.mark.parametrize("criterion", ["ce", "bce"])
def test_a_run_is_killed_and_resumed_to_the_same_bits(criterion: str, tmp_path: Path) -> None:
    one = recipe(
        "dml-network/resnet8/digits",
        epochs=2,
        batch_size=100,
        students=2,
        criterion=criterion,
        label_smoothing=0.1,
        ce_weight=0.5,
        class_weights="balanced",
    )
    fastokd.train(one, out=tmp_path / "whole", **QUICK)
    fastokd.train(one, out=tmp_path / "cut", max_steps=1, **QUICK)
    fastokd.train(one, out=tmp_path / "cut", resume=True, **QUICK)
    whole, cut = (
        newest_checkpoint(tmp_path / name / "checkpoints")[1] for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
