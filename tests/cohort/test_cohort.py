"""A cohort is its students: same state, same numbers, whatever is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError


@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize("students", [1, 2, 8])
def test_outputs_are_the_students_own(sharing: str, students: int) -> None:
    cohort = Cohort(("resnet8", students), 10, sharing=sharing).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = cohort(images)
    assert out.logits_SBC.shape == (students, 2, 10)
    assert out.features_SBD.shape == (students, 2, 64)
    assert (out.trunk_BCHW is None) == (sharing == "network")
    for index in range(students):
        whole = cohort.student(index).double().outputs(images)
        torch.testing.assert_close(out.logits_SBC[index], whole.logits_BC)
        torch.testing.assert_close(out.features[index], whole.features_BD)
        torch.testing.assert_close(out.maps[index], whole.maps)


def test_a_mixed_cohort_has_students_of_several_models() -> None:
    cohort = Cohort(["resnet8", "resnet20"], 10, sharing="network")
    assert cohort(torch.randn(2, 3, 32, 32)).logits_SBC.shape == (2, 2, 10)
    assert "layer1.2.conv1.weight" in cohort.student_state(1)


def test_state_is_per_student() -> None:
    cohort = Cohort(("resnet8", 2), 10)
    heads = {key.split(".")[0] for key in cohort.state_dict()}
    assert heads == {"trunk", "students"}
    assert set(cohort.student_state(1)) == set(cohort.student(1).state_dict())
    assert {key for key, _ in cohort.named_parameters()} <= set(cohort.state_dict())


def test_initial_weights_depend_on_seed_and_index_alone() -> None:
    a = Cohort(("resnet8", 2), 10, sharing="network", seed=3)
    torch.manual_seed(99)
    b = Cohort(("resnet8", 3), 10, sharing="network", seed=3)
    other = Cohort(("resnet8", 2), 10, sharing="network", seed=4)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])
    fc = "students.0.fc.weight"
    assert not torch.equal(a.state_dict()[fc], other.state_dict()[fc])
    assert not torch.equal(a.state_dict()[fc], a.state_dict()["students.1.fc.weight"])


def test_uint8_images_are_normalised() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    cohort = Cohort(("resnet8", 2), 10, mean=mean, std=std).eval()
    images_BHWC = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    x_BCHW = images_BHWC.permute(0, 3, 1, 2) / 255
    x_BCHW = (x_BCHW - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(
        cohort(images_BHWC).logits_SBC, cohort(x_BCHW).logits_SBC, rtol=1e-4, atol=1e-5
    )


def test_a_teacher_is_frozen_and_no_part_of_the_state() -> None:
    teacher = Cohort(("resnet8", 1), 10).student(0)
    cohort = Cohort(("resnet8", 2), 10, teacher=teacher)
    images = torch.randn(4, 3, 32, 32)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    out = cohort.train()(images)
    assert out.extra_logits_EBC is not None
    assert out.extra_logits_EBC.shape == (1, 4, 10)
    out.logits_SBC.sum().backward()
    assert not teacher.training
    assert not out.extra_logits_EBC.requires_grad
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert len(list(cohort.parameters())) == len(list(Cohort(("resnet8", 2), 10).parameters()))
    cohort.double()
    assert next(teacher.parameters()).dtype == torch.float64


def test_the_trunk_gradient_is_scaled() -> None:
    images = torch.randn(4, 3, 32, 32)
    grads = []
    for scale in (1.0, 0.25):
        cohort = Cohort(("resnet8", 2), 10, trunk_grad_scale=scale)
        cohort(images).logits_SBC.square().sum().backward()
        grads.append({key: p.grad for key, p in cohort.named_parameters()})
    for key, grad in grads[0].items():
        factor = 0.25 if key.startswith("trunk") else 1.0
        torch.testing.assert_close(grads[1][key], factor * grad)


@pytest.mark.parametrize(
    ("students", "options", "says"),
    [
        ([], {}, "0 students"),
        (("resnet8", 0), {}, "0 students"),
        ("resnet8", {}, "give a name and a count"),
        (("resnet9", 2), {}, "did you mean"),
        (["resnet8", "resnet20"], {}, "shares one trunk"),
        (("resnet8", 2), {"sharing": "trunk"}, "choose branch or network"),
        (("resnet8", 2), {"engine": "warp"}, "engine is 'warp'"),
    ],
)
def test_bad_choices_are_named(students: object, options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Cohort(students, 10, **options)  # type: ignore[arg-type]


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes is 1"):
        Cohort(("resnet8", 2), 1)


def test_it_is_a_module() -> None:
    assert isinstance(Cohort(("resnet8", 2), 10), nn.Module)


def test_an_implementation_that_the_norms_lack_is_refused() -> None:
    cohort = Cohort(("resnet8", 2), 10, impl="triton")
    with pytest.raises(UserError, match="triton"):
        cohort(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
