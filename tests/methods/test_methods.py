"""The methods do what they say: what moves, what is switched off, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import Progress, create_method, list_methods, method_class, ramp_weight
from fastokd.ops import mixture_distillation
from fastokd.ops.peer_attention_distillation import peer_scores


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
    loss = okddip.peer_attention_distillation
    monkeypatch.setattr(
        okddip, "peer_attention_distillation", lambda *a, **k: loss(*a, **{**k, "ce_weight": 0.0})
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
    with pytest.raises(UserError, match="unknown option of okddip 'warmth'"):
        create_method("okddip", Cohort(("resnet8", 2), 10).shape, warmth=1)
    assert {"baseline", "ind", "okddip"} <= set(list_methods())


def test_one_trains_its_gate_and_says_whom_it_trusts() -> None:
    _, before, _ = train("one", steps=0)
    for options in ({}, {"detach_targets": True}):
        cohort, method, images = train("one", **options)
        for name, parameter in method.named_parameters():
            assert not torch.equal(parameter, dict(before.named_parameters())[name]), name
        attention = method.eval().diagnostics(cohort.eval()(images))["attention"]
        assert attention.shape == (3, 3)
        torch.testing.assert_close(attention.sum(1), torch.ones(3))
        assert (attention[0] == attention[2]).all()
    assert not torch.allclose(leader(train("one")[0]), leader(train("one", detach_targets=True)[0]))


def test_one_refuses_a_batch_of_one() -> None:
    cohort = Cohort(("resnet8", 2), 10)
    method = create_method("one", cohort.shape)
    out = cohort(torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match="a batch holds one image"):
        method(out, torch.tensor([1]), Progress.start())
    method.eval()(out, torch.tensor([1]), Progress.start())


@pytest.mark.parametrize("name", ["dml", "kd"])
def test_no_ramp_where_none_was_published(name: str) -> None:
    teacher = Cohort(("resnet8", 1), 10).student(0)
    cohort = Cohort(("resnet8", 2), 10, sharing="network", teacher=teacher)
    method = create_method(name, cohort.shape)
    out, labels_B = cohort(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))
    totals = [method(out, labels_B, Progress.start(ramp=ramp)).total for ramp in (0.0, 0.5, 1.0)]
    assert totals[0] == totals[1] == totals[2]
    assert totals[0] > create_method("ind", cohort.shape)(out, labels_B, Progress.start()).total


def test_a_teachers_terms_have_no_ramp() -> None:
    teacher = Cohort(("resnet8", 1), 10).student(0)
    cohort = Cohort(("resnet8", 3), 10, teacher=teacher)
    method = create_method("okddip_kd", cohort.shape)
    out, labels_B = cohort(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))
    loss = method(out, labels_B, Progress.start(ramp=0.0))
    expected = loss.parts["ce_S"].sum() + loss.parts["teacher_kd_S"].sum()
    torch.testing.assert_close(loss.total.detach(), expected)
    assert (loss.parts["teacher_kd_S"] > 0).all()


def test_random_beliefs_are_fresh_and_a_function_of_the_generator() -> None:
    method = create_method("okddip_random", Cohort(("resnet8", 4), 10).shape)
    drawn = [method.draw(5, torch.Generator().manual_seed(s))["belief_BPP"] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (5, 3, 3)
    assert (drawn[0] > 0).all()


def test_entropys_peers_learn_from_labels_alone() -> None:
    """Each is its own target, which its gradient passes both ways; the leader learns from all."""
    cohort = Cohort(("resnet8", 3), 10)
    method = create_method("okddip_entropy", cohort.shape)
    out = cohort(torch.randn(4, 3, 32, 32))
    loss = method(out, torch.randint(10, (4,)), Progress.start())
    assert loss.parts["kd_S"][:2].abs().max() < 1e-6
    assert loss.parts["kd_S"][2] > 0


def test_no_two_level_has_no_leader() -> None:
    cohort, method, images = train("okddip_no_two_level")
    attention = method.diagnostics(cohort(images))["attention"]
    assert (attention > 0).all()
    assert not method.needs.leader


def test_symmetric_attention_hears_as_it_is_heard_and_needs_one_width() -> None:
    cohort, method, images = train("okddip_symmetric")
    out = cohort(images)
    scores_BPP = method.peer_scores(out, Progress.start())
    torch.testing.assert_close(scores_BPP, scores_BPP.mT)
    mixed = Cohort(["resnet8", "wrn_16_2", "resnet8"], 10, sharing="network")
    with pytest.raises(UserError, match="64, 128 wide"):
        create_method("okddip_symmetric", mixed.shape)


def test_mixed_peers_get_projections_of_their_width() -> None:
    mixed = Cohort(["resnet8", "wrn_16_2", "vgg16"], 10, sharing="network")
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in create_method("okddip", mixed.shape).named_parameters()
    }
    assert shapes == {
        "query.64.weight": (8, 64),
        "query.128.weight": (8, 128),
        "key.64.weight": (8, 64),
        "key.128.weight": (8, 128),
    }
    method = create_method("okddip", mixed.shape, attention_dim=5)
    assert method.query["64"].weight.shape == (5, 64)
    with pytest.raises(UserError, match="attention_dim must be a whole number, at least 1"):
        create_method("okddip", mixed.shape, attention_dim=0)


def test_clilr_and_one_are_branches() -> None:
    for name in ("cl_ilr", "one"):
        with pytest.raises(UserError, match="no network form: choose branch"):
            create_method(name, Cohort(("resnet8", 2), 10, sharing="network").shape)


@pytest.mark.parametrize("name", list_methods())
def test_bf16_changes_a_loss_by_its_rounding_alone(name: str) -> None:
    needs = method_class(name).needs
    teacher = Cohort(("resnet8", 1), 10).student(0)
    cohort = Cohort(("resnet8", 3), 10, sharing=needs.sharing[0], teacher=teacher)
    method = create_method(name, cohort.shape)
    images, labels_B = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    progress = Progress.start()
    progress.draws = method.draw(8, torch.Generator().manual_seed(0))
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = method(cohort(images), labels_B, progress)
        loss.total.backward()
        assert loss.total.dtype == torch.float32
        totals.append(loss.total.detach())
    torch.testing.assert_close(totals[0], totals[1], rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ["okddip", "okddip_no_two_level"])
def test_the_loss_from_queries_and_keys_is_that_of_the_scores(name: str) -> None:
    cohort = Cohort(("resnet8", 4), 10).double()
    method = create_method(name, cohort.shape).double()
    out, labels_B = cohort(torch.randn(6, 3, 8, 8).double()), torch.randint(10, (6,))
    loss = method(out, labels_B, Progress.start(ramp=0.4))
    scores = method.scores(out, labels_B, Progress.start())
    expected = mixture_distillation(out.logits_SBC, labels_B, scores, kd_weight=0.4)
    torch.testing.assert_close(loss.total, expected.total)
    torch.testing.assert_close(loss.parts["kd_S"], expected.kd_S)


@pytest.mark.parametrize("name", ["okddip", "okddip_symmetric"])
def test_peers_are_compared_in_fp32_under_autocast(name: str) -> None:
    """Inner products in bf16 would round scores of 100 to whole numbers."""
    shape = CohortShape(3, 10, "branch", (64, 64, 64), 32, ((), (), ()))
    method = create_method(name, shape)
    features = tuple((3 * torch.randn(5, 64)).bfloat16() for _ in range(3))
    out = CohortOutput(torch.zeros(3, 5, 10), features, (), None, None)
    with torch.autocast("cpu", torch.bfloat16):
        ours = method.peer_scores(out, Progress.start())
        projected = method.projections(out) if name == "okddip" else None
    query, key = projected or (torch.stack(features[:2], dim=1),) * 2
    exact = query.double() @ key.double().mT
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        scores_BSS = peer_scores(query, key, 3)
    torch.testing.assert_close(scores_BSS[:, :2, :2].double(), exact, rtol=1e-6, atol=1e-4)


def test_a_ramp_is_kept_as_exact_as_is_asked() -> None:
    """A method that is called by hand in float64 has its weight in float64."""
    assert Progress.start(ramp=0.3).ramp.item() == 0.3
    assert Progress.start(ramp=0.3, dtype=torch.float32).ramp.dtype == torch.float32
