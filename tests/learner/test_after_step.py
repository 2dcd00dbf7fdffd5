"""What a method writes after the optimizer is guarded, checkpointed and captured as the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.learner.step import step, training_step
from fastokd.methods import Progress, register_method
from fastokd.methods.okddip import OKDDip
from fastokd.recipe.names import recipe
from fastokd.run.session import Session
from tests.learner.every_method import Recorder
from tests.learner.test_guard import BAD, STEPS, digest, go, poison_gradient, session_of


class Averaging(OKDDip):
    """Averages a classifier of the cohort, and gives the average to another student now and then."""

    average_CD: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("average_CD", torch.zeros(10, self.shape.feature_dims[0]))

    def after_step(self, cohort: Cohort, progress: Progress) -> None:
        """A hybrid: student 1's classifier is the average of student 0's where the ramp is small."""
        mine, other = (cohort.students[s].get_submodule("fc").weight for s in (0, 1))
        assert isinstance(mine, nn.Parameter)
        assert isinstance(other, nn.Parameter)
        self.average_CD.lerp_(mine, 0.1)
        other.copy_(torch.where(progress.ramp < 0.5, self.average_CD, other))


def averaging() -> Session:
    name = "tests.learner.test_after_step:Averaging"
    register_method(name)
    return session_of(
        recipe("okddip-branch/resnet8/digits", epochs=4, students=3, batch_size=6, method=name)
    )


def test_it_runs_after_each_step() -> None:
    session = averaging()
    go(session, steps=1)
    weight = session.learner.cohort.students[1].get_submodule("fc").weight
    torch.testing.assert_close(weight, session.learner.method.average_CD, rtol=0, atol=0)
    assert weight.norm() > 0


def test_a_step_that_is_not_taken_leaves_no_trace_of_it() -> None:
    whole, hurt = averaging(), averaging()
    for session in (whole, hurt):
        poison_gradient(session)
    go(whole, steps=BAD)
    with pytest.raises(UserError, match=r"step 3 .*student 2's"):
        go(hurt, steps=BAD + 2)
    assert digest(hurt) == digest(whole)


def test_it_is_resumed_to_the_same_bits() -> None:
    whole, begun, resumed = averaging(), averaging(), averaging()
    go(whole)
    go(begun, steps=3)
    resumed.load_state(*begun.state())
    go(resumed, steps=STEPS)
    assert digest(resumed) == digest(whole)


def test_it_is_part_of_a_captured_step() -> None:
    plain, captured = averaging(), averaging()
    graphs = CapturedStep(
        partial(step, captured.learner), captured.learner.device, Recorder(), warm_up=2
    )
    for session, run in ((plain, partial(training_step, plain.learner)), (captured, graphs)):
        session.learner.train()
        torch.manual_seed(0)
        for _ in range(5):
            session.begin_epoch()
            images, labels = session.next_batch()
            session.begin_step(len(labels))
            run(images, labels)
            session.batch += 1
            session.step += 1
    for name, value in plain.learner.method.state_dict().items():
        torch.testing.assert_close(
            captured.learner.method.state_dict()[name], value, rtol=0, atol=0
        )
    theirs = captured.learner.cohort.state_dict()
    for name, value in plain.learner.cohort.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)
