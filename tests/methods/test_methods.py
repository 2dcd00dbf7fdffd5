"""The methods do what they say: what moves, what is switched off, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.methods import Progress, create_method, list_methods, method_class, ramp_weight


def train(
    method_name: str, steps: int = 3, ramp: float = 1.0, sharing: str = "branch", **options: float
) -> tuple[Cohort, torch.nn.Module, Tensor]:
    torch.manual_seed(5)
    cohort = Cohort(("resnet8", 3), 10, sharing=sharing)
    method = create_method(method_name, cohort.shape, **options)
    optimizer = torch.optim.SGD([*cohort.parameters(), *method.parameters()], lr=0.1, momentum=0.9)
    images, labels_B = torch.randn(12, 3, 32, 32), torch.randint(10, (12,))
    for _ in range(steps):
        loss = method(cohort(images), labels_B, Progress.start(ramp=ramp))
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return cohort, method, images


def leader(cohort: Cohort) -> Tensor:
    return torch.cat([p.detach().flatten() for p in cohort.students[-1].parameters()])


def test_okddip_learns_whom_to_listen_to() -> None:
    _, before, _ = train("okddip", steps=0)
    cohort, method, images = train("okddip")
    for name, parameter in method.named_parameters():
        assert not torch.equal(parameter, dict(before.named_parameters())[name]), name
    attention = method.diagnostics(cohort(images))["attention"]
    assert attention.shape == (3, 3)
    assert (attention[:2, :2] - 0.5).abs().max() > 1e-3  # the peers' rows are not uniform
    torch.testing.assert_close(attention[2], torch.tensor([0.5, 0.5, 0.0]))
    assert (attention[:, 2] == 0).all()  # nobody listens to the leader


def test_detached_targets_leave_the_projections_as_they_were() -> None:
    _, before, _ = train("okddip", steps=0)
    _, after, _ = train("okddip", detach_targets=True)
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, dict(before.named_parameters())[name]), name


def test_distillation_changes_the_leader() -> None:
    with_kd, without = leader(train("okddip")[0]), leader(train("okddip", kd_weight=0.0)[0])
    assert not torch.allclose(with_kd, without)
    assert torch.equal(leader(train("okddip", ramp=0.0)[0]), without)


def test_cross_entropy_changes_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastokd.methods import okddip

    whole = leader(train("okddip")[0])
    loss = okddip.mixture_distillation
    monkeypatch.setattr(
        okddip, "mixture_distillation", lambda *a, **k: loss(*a, **{**k, "ce_weight": 0.0})
    )
    assert not torch.allclose(whole, leader(train("okddip")[0]))


@pytest.mark.parametrize("name", ["okddip", "ind"])
def test_students_of_a_branch_cohort_share_the_trunk_alone(name: str) -> None:
    cohort, _, _ = train(name)
    assert cohort.trunk is not None
    first, second = (dict(student.named_parameters()) for student in list(cohort.students)[:2])
    assert all(key.startswith(("layer3", "fc")) for key in first)
    assert not torch.allclose(first["fc.weight"], second["fc.weight"])


def test_independent_students_do_not_hear_each_other() -> None:
    """In a network cohort each student of Ind is the lone student, to the bit."""
    torch.manual_seed(5)
    images, labels_B = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    cohort = Cohort(("resnet8", 2), 10, sharing="network")
    create_method("ind", cohort.shape)(cohort(images), labels_B, Progress.start()).total.backward()
    for index in range(2):
        alone = cohort.student(index).train()
        torch.nn.functional.cross_entropy(alone(images), labels_B).backward()
        for key, parameter in cohort.students[index].named_parameters():
            theirs = dict(alone.named_parameters())[key].grad
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-6)


def test_ramp_is_the_papers() -> None:
    assert ramp_weight(0, 80) == pytest.approx(0.006737947)
    assert ramp_weight(40, 80) == pytest.approx(0.2865048)
    assert ramp_weight(80, 80) == ramp_weight(299, 80) == 1.0
    assert ramp_weight(0, 0) == 1.0


def test_bad_choices_are_named() -> None:
    with pytest.raises(UserError, match="did you mean okddip"):
        method_class("okdip")
    with pytest.raises(UserError, match="at least 2"):
        create_method("okddip", Cohort(("resnet8", 1), 10).shape)
    with pytest.raises(UserError, match="no branch form"):
        create_method("baseline", Cohort(("resnet8", 1), 10).shape)
    with pytest.raises(UserError, match="'okddip' can't take"):
        create_method("okddip", Cohort(("resnet8", 2), 10).shape, warmth=1)
    assert {"baseline", "ind", "okddip"} <= set(list_methods())
