"""MCL's memory of the training images in a run: resumed, captured, in parts, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import OurLoop
from fastokd.errors import UserError
from fastokd.learner.step import training_step
from fastokd.methods import INDEX
from fastokd.plan.trace import trace_ours
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from tests.learner.test_sync_free import NoWaits
from tests.run.test_one_replay import loop_of, same


def of_form(form: str, **changes: Any) -> Recipe:
    options = {"form": form, "negatives": 12}
    settings = {"epochs": 4, "batch_size": 24, "students": 2, **changes}
    return recipe("mcl/resnet8/digits", method_options=options, **settings)


def session_of(one: Recipe, *, captured: bool = False, **options: Any) -> Session:
    return loop_of(one, torch.device("cpu"), captured=captured, **options)


def steps(session: Session, count: int) -> None:
    session.begin_epoch()
    session.learner.train()
    for batch in session.batches(lambda: None):
        training_step(session.learner, *batch, body=session.whole_step)
        session.finish_step()
        count -= 1
        if count == 0:
            return


def test_a_run_with_a_memory_goes_on_with_the_same_bits() -> None:
    """Also captured, where the draws and the images' numbers come through the graph's inputs."""
    one = of_form("memory", batch_size=30)
    whole, begun, resumed = (session_of(one, captured=captured) for captured in (False, True, True))
    start_SND = memory_of(whole).clone()
    steps(whole, 7)
    steps(begun, 4)
    resumed.load_state(*begun.state())
    steps(resumed, 3)
    same(resumed, whole)
    assert not torch.equal(memory_of(whole), start_SND)


def memory_of(session: Session) -> Tensor:
    return session.learner.method.state_dict()["memory.memory_SND"]


def test_a_step_renews_the_rows_of_its_images_alone() -> None:
    session = session_of(of_form("memory", batch_size=30), accumulate=3)
    memory = memory_of(session)
    before_SND = memory.clone()
    steps(session, 1)
    rows = session.stream.order.samples(0, 0)  # type: ignore[attr-defined]
    changed_N = (memory != before_SND).any(-1).all(0)
    assert torch.equal(changed_N.nonzero()[:, 0], rows.sort().values)
    torch.testing.assert_close(memory[:, rows].norm(dim=-1), torch.ones(2, 30))


def test_a_step_that_is_not_taken_leaves_it_and_no_step_copies_it() -> None:
    session = session_of(of_form("memory", batch_size=30))
    learner, memory = session.learner, memory_of(session)
    start_SND = memory.clone()
    learner.guard.fault.fill_(1.0)
    steps(session, 1)
    assert torch.equal(memory, start_SND)
    groups = [*learner.before.statistics.groups, *learner.before.rest.groups]
    assert memory.data_ptr() not in {x.data_ptr() for group in groups for x in group}
    learner.guard.forget()
    steps(session, 1)
    assert not torch.equal(memory, start_SND)


@pytest.mark.parametrize("form", ["memory", "okd"])
def test_it_reads_nothing_back(form: str) -> None:
    how = RunOptions(device="cpu", precision="bf16", engine="loop", impl="torch", accumulate=2)
    session = OurLoop(of_form(form, batch_size=6), how).session
    (images,) = next(session.batches(lambda: None))
    assert INDEX in session.blocks[images].tensors
    with NoWaits():
        training_step(session.learner, images, body=session.whole_step)


def test_where_it_is_refused() -> None:
    with pytest.raises(
        UserError, match="overfit_batch repeats a batch without its images' numbers"
    ):
        build(of_form("memory"), RunOptions(device="cpu", quiet=True, overfit_batch=True))
    with pytest.raises(UserError, match="keeps a memory of all training images, which a plan"):
        trace_ours(of_form("memory"), 4, "loop", "fp32", "torch")
