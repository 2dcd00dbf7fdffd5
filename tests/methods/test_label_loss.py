"""The settings of the loss on labels in every method: against the plain loops, timm and torch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from fastokd import methods
from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import (
    LabelLoss,
    Method,
    MethodLoss,
    Progress,
    create_method,
    list_methods,
    method_class,
)
from fastokd.methods.label_loss import balanced_weights
from fastokd.models import create_model
from fastokd.reference import Lambdas, ReferenceFFSD, ReferenceKD, ReferenceOKDDipKD, ffsd_losses
from fastokd.reference.label_loss import label_loss
from tests.reference.test_method_steps import BATCH, CASES, CLASSES, RAMP, SIZE, Case

# DKD takes no mixed labels.
MIXABLE = [
    case for case in CASES if case.method != "dkd" and case.options.get("divergence") != "dkd"
]
CLASS_WEIGHT_C = torch.linspace(0.02, 3.0, CLASSES)
SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "ce": {"smoothing": 0.1, "weight": 0.7, "class_weight_C": CLASS_WEIGHT_C},
    "bce": {"criterion": "bce", "smoothing": 0.1, "weight": 1.3, "class_weight_C": CLASS_WEIGHT_C},
    "bce with a threshold": {
        **{"criterion": "bce", "smoothing": 0.1, "threshold": 0.2},
        "class_weight_C": CLASS_WEIGHT_C,
    },
}


def labels_of(batch: int = BATCH) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Labels, and second labels with shares 0 and 1 among them."""
    share2_B = torch.rand(batch, dtype=torch.float64)
    share2_B[:2] = torch.tensor([0.0, 1.0])
    labels_B = torch.randint(CLASSES, (batch,))
    return labels_B, (torch.randint(CLASSES, (batch,)), share2_B)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("case", MIXABLE, ids=str)
def test_every_method_is_its_loop(case: Case, name: str) -> None:
    """Total and gradients in float64, with mixed labels."""
    torch.manual_seed(3)
    settings, students = SETTINGS[name], max(case.students[0], min(3, case.students[-1]))
    labels_B, mixed_with = labels_of()
    sharing = case.sharing[0]
    taught = method_class(case.method).needs.teacher
    teacher = create_model("resnet8", CLASSES).double() if taught else None
    loop = case.loop("resnet8", CLASSES, students, sharing).double()
    for attribute, value in case.attributes.items():
        setattr(loop, attribute, value)
    loop.label_loss = partial(label_loss, mixed_with=mixed_with, **settings)  # type: ignore[method-assign]
    if case.method == "kdcl":
        loop.mixed_with = mixed_with  # type: ignore[assignment]
    if teacher is not None:
        assert isinstance(loop, (ReferenceKD, ReferenceOKDDipKD))
        loop.set_teacher(teacher)
    cohort = Cohort(("resnet8", students), CLASSES, sharing=sharing, teacher=teacher).double()
    method = create_method(
        case.method, cohort.shape, label_loss=LabelLoss(**settings), **case.options
    ).double()
    state = loop.state_dict()
    cohort.load_state_dict({k: state[k] for k in cohort.state_dict()})
    method.load_state_dict({k: state[k] for k in method.state_dict() if k != "weights_S"}, False)

    progress = Progress(
        torch.zeros(()), torch.tensor(RAMP, dtype=torch.float64), mixed_with=mixed_with
    )
    draws = method.draw(BATCH, torch.Generator().manual_seed(0))
    progress.draws = {key: value.double() for key, value in draws.items()}
    for key, value in progress.draws.items():
        setattr(loop, key, value)
    images = torch.randn(BATCH, 3, SIZE, SIZE).double()
    ours = method(cohort(images), labels_B, progress)
    theirs = loop.losses(loop.outputs(images), labels_B, RAMP)
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        ours.parts["ce_S"] * settings.get("weight", 1.0), torch.stack(theirs.ce).detach()
    )
    ours.total.backward()
    theirs.total.backward()
    found = dict([*cohort.named_parameters(), *method.named_parameters()])
    for key, parameter in loop.named_parameters():
        grad = found[key].grad
        if parameter.grad is None:
            assert grad is None or not grad.any(), key
        else:
            assert grad is not None, key
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", SETTINGS)
def test_ffsd_is_its_loop(name: str) -> None:
    settings = SETTINGS[name]
    labels_B, mixed_with = labels_of()
    cohort = Cohort(("resnet8", 3), CLASSES, sharing="network").double()
    method = create_method("ffsd", cohort.shape, label_loss=LabelLoss(**settings)).double()
    loop = ReferenceFFSD("resnet8", CLASSES).double()
    loop.load_state_dict({**cohort.state_dict(), **method.state_dict()})
    images = torch.randn(BATCH, 3, 16, 16).double()
    progress = Progress(torch.zeros(()), torch.tensor(1.0).double(), mixed_with=mixed_with)
    ours = method(cohort(images), labels_B, progress)
    losses = ffsd_losses(
        loop,
        images,
        labels_B,
        Lambdas(),
        label_loss=partial(label_loss, mixed_with=mixed_with, **settings),
    )
    each = [*losses.students, losses.fusion, losses.leader, *losses.decoders.values()]
    torch.testing.assert_close(ours.total, sum(each), rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    ours.total.backward()
    for loss in each:
        loss.backward()
    found = dict([*cohort.named_parameters(), *method.named_parameters()])
    for key, parameter in loop.named_parameters():
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_all_methods_take_them() -> None:
    for name in list_methods():
        needs = method_class(name).needs
        assert needs.label_loss, name
        assert needs.mixed_labels == (name not in ("dkd", "mcl")), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_bce_is_timms(smoothing: float, threshold: float | None, share: float | None) -> None:
    """With one label, and with timm's Mixup, which pairs the batch with itself reversed."""
    pytest.importorskip("timm")
    from timm.data.mixup import mixup_target
    from timm.loss import BinaryCrossEntropy

    z_SBC, labels_B = torch.randn(2, 8, CLASSES).double(), torch.randint(CLASSES, (8,))
    theirs = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    ours = LabelLoss(criterion="bce", smoothing=smoothing, threshold=threshold or 0.0)
    mixed_with = None
    target = labels_B
    if share is None:
        expected = [theirs(z_BC, labels_B).double() for z_BC in z_SBC]
    else:
        # In float64; timm makes the targets in float32.
        target = mixup_target(labels_B, CLASSES, 1 - share, smoothing)
        mixed_with = labels_B.flip(0), torch.full((8,), share, dtype=torch.float64)
        expected = [theirs(z_BC, target) for z_BC in z_SBC]
    found = ours.binary(z_SBC, labels_B, mixed_with)
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-7, atol=1e-7)
    exact = torch.stack(
        [
            label_loss(
                z,
                labels_B,
                mixed_with=mixed_with,
                criterion="bce",
                smoothing=smoothing,
                threshold=threshold or 0.0,
            )
            for z in z_SBC
        ]
    )
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_bce_of_a_label_out_of_range_is_nan_where_it_counts() -> None:
    z_SBC, (labels_B, (labels2_B, share2_B)) = torch.randn(1, 4, CLASSES), labels_of(4)
    ours = LabelLoss(criterion="bce", threshold=0.2, smoothing=0.1)

    def is_nan(labels_B: Tensor, labels2_B: Tensor) -> bool:
        return bool(ours.binary(z_SBC, labels_B, (labels2_B, share2_B)).isnan())

    def with_wrong(ids_B: Tensor, at: int) -> Tensor:
        return ids_B.index_fill(0, torch.tensor(at), CLASSES)

    assert not is_nan(labels_B, labels2_B)
    assert [is_nan(with_wrong(labels_B, at), labels2_B) for at in (0, 1)] == [True, False]
    assert [is_nan(labels_B, with_wrong(labels2_B, at)) for at in (0, 1)] == [False, True]
    assert ours.binary(z_SBC, with_wrong(labels_B, 0), None).isnan().all()


def test_class_weights_are_torchs() -> None:
    """Where no label is smoothed: torch smooths by the weights of all classes, and divides by the sum of
    the samples' weights where means here are over samples."""
    z_SBC, labels_B = torch.randn(2, 8, CLASSES), torch.randint(CLASSES, (8,))
    method = create_method(
        "ind",
        CohortShape(2, CLASSES, "network", (8, 8), None, ((), ())),
        label_loss=LabelLoss(class_weight_C=CLASS_WEIGHT_C),
    )
    out = CohortOutput(z_SBC, (), (), None, None)
    found = method(out, labels_B, Progress.start())
    expected = [
        F.cross_entropy(z_BC, labels_B, CLASS_WEIGHT_C, reduction="none").mean() for z_BC in z_SBC
    ]
    torch.testing.assert_close(found.parts["ce_S"], torch.stack(expected))


def test_balanced_weights_are_scikit_learns() -> None:
    labels_N = torch.randint(4, (100,)) ** 2
    weights_C = balanced_weights(labels_N, 12)
    present = labels_N.unique()
    expected = compute_class_weight("balanced", classes=present.numpy(), y=labels_N.numpy())
    torch.testing.assert_close(weights_C[present], torch.tensor(expected).float())
    assert math.isclose(weights_C[labels_N].mean(), 1.0, rel_tol=1e-6)
    assert weights_C.isfinite().all()


class Plain(Method):
    """An own method that doesn't know of the settings."""

    def __init__(self, shape: CohortShape, *, impl: str = "auto") -> None:
        super().__init__(shape)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        return MethodLoss(out.logits_SBC.sum(), {})


def test_a_method_without_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods._OWN, "own:Plain", Plain)
    shape = CohortShape(2, CLASSES, "network", (8, 8), None, ((), ()))
    create_method("own:Plain", shape)
    with pytest.raises(UserError, match="doesn't use the settings of the loss on labels"):
        create_method("own:Plain", shape, label_loss=LabelLoss(smoothing=0.1))
