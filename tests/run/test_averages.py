"""Averages as settings of a recipe: whose are kept, scored and exported, and what a resumed run has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.checkpoint import load_checkpoint, newest_checkpoint
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator
from fastokd.export import export
from fastokd.recipe.names import Recipe, recipe
from fastokd.recipe.settings import parse_settings, wanted_runs
from fastokd.run.build import build
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT

QUICK: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop", "device": "cpu"}
ALL: dict[str, Any] = {
    **{"swa": True, "average_start": 1, "average_every": 2},
    **{"average_students": "all", "average_norms": "recomputed"},
    **{"frozen_stages": 1, "frozen_epochs": 3},
}
NAME = "okddip-branch@2/resnet8/digits"


def small(**changes: Any) -> Recipe:
    """Two steps an epoch."""
    return recipe(NAME, **{"epochs": 3, "batch_size": 50, "lr": 0.02, **changes})


@pytest.fixture(autouse=True, scope="module")
def _without_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastokd.report.page.report", lambda runs, **how: None)
        yield


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("every") / "run"
    return fastokd.train(small(**ALL), out=out, **QUICK)


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last-000000006")[0]


def test_every_students_average_is_scored_kept_and_told(every: Run, tmp_path: Path) -> None:
    last = every.metrics[-1]["test"]
    assert len(last["ema_student_top1"]) == 2
    assert last["ema_top1"] == last["ema_leader_top1"] == last["ema_student_top1"][1]
    assert last["ema_student_top1"] != last["student_top1"]
    summary = summarise(every)
    assert (summary.reported, summary.last) == ("ema_leader", last["ema_leader_top1"])
    tensors = newest(every.folder)
    for student, prefix in ((0, "ema0."), (1, "ema."), (None, "ema.")):
        found = read_weights(every.folder, student=student)
        assert torch.equal(found.state["bn1.running_var"], tensors[f"{prefix}bn1.running_var"])
        assert (
            found.fact("score")["top1"]
            == last["ema_student_top1"][1 if student is None else student]
        )
        assert (found.fact("ema"), found.fact("swa")) == (None, True)
    card = (export(every.folder, "hub", tmp_path / "hub").folder / "README.md").read_text()
    assert "uniform average over the steps from epoch 2 on (SWA)" in card
    assert fastokd.evaluate(every.folder, **QUICK)["test"] == last


def test_recomputed_statistics_are_those_that_are_kept(every: Run) -> None:
    """They aren't the last step's, and the exported student's logits are the scored ones."""
    tensors = newest(every.folder)
    norm = "layer2.0.bn1"
    averaged = tensors[f"ema.{norm}.running_mean"]
    assert (averaged - tensors[f"cohort.trunk.{norm}.running_mean"]).abs().max() > 1e-3
    assert tensors[f"ema.{norm}.num_batches_tracked"] == 2
    assert tensors["ema.bn1.num_batches_tracked"] == 0  # of a frozen stage


def test_an_average_lies_in_memory_as_its_weights_do() -> None:
    learner = build(small(ema=0.9), RunOptions(**QUICK)).learner
    assert learner.average is not None
    live, averaged = learner.cohort.student_state(1), learner.average.states[1]
    assert not live["conv1.weight"].is_contiguous()
    assert {k: x.stride() for k, x in averaged.items()} == {k: x.stride() for k, x in live.items()}


def test_frozen_norms_keep_their_statistics_after_the_run_too(tmp_path: Path) -> None:
    """The last step was in an epoch that froze them."""
    one = small(swa=True, average_norms="recomputed", epochs=1, frozen_stages=1, frozen_epochs=1)
    run = fastokd.train(one, out=tmp_path / "run", **QUICK)
    options = RunOptions(out=run.folder, **QUICK)
    session = build(one, options, training=False)
    session.load_state(*newest_checkpoint(run.folder / "checkpoints")[1:3])
    average = session.learner.average
    assert average is not None
    before = {name: value.clone() for name, value in average.entries().items()}
    assert Evaluator(session)()["test"] == run.last["test"]
    assert before.keys() == average.entries().keys()
    for name, value in average.entries().items():
        assert torch.equal(value, before[name]), name


def test_a_resumed_run_has_the_same_bits(every: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fastokd.train(small(**ALL), out=out, max_steps=3, **QUICK)
    fastokd.train(small(**ALL), out=out, resume=True, **QUICK)
    ours, theirs = newest(out), newest(every.folder)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []
    assert Run.load(out).metrics[-1]["test"] == every.metrics[-1]["test"]


def test_the_raw_weights_are_kept_on_request(every: Run, tmp_path: Path) -> None:
    """And an average changes nothing of the training."""
    run = fastokd.train(
        small(ema=0.9, keep="raw", frozen_stages=1, frozen_epochs=3), out=tmp_path / "raw", **QUICK
    )
    last = run.metrics[-1]["test"]
    assert 0 <= last["ema_top1"] <= 1
    assert summarise(run).reported == "leader"
    kept = read_weights(run.folder / STUDENT)
    tensors = newest(run.folder)
    assert torch.equal(kept.state["fc.weight"], tensors["cohort.students.1.fc.weight"])
    assert kept.fact("score")["top1"] == last["student_top1"][1]
    assert (kept.fact("ema"), "swa" in kept.facts) == (None, False)
    theirs = newest(every.folder)
    assert all(torch.equal(v, theirs[k]) for k, v in tensors.items() if k.startswith("cohort."))


def test_a_run_of_before_had_its_decay_as_an_option(tmp_path: Path) -> None:
    """Its recipe.json, its checkpoints' recipes and its environment.json as they were written."""
    run = fastokd.train(small(ema=0.5), out=tmp_path / "run", max_steps=2, **QUICK)
    fields = [name for name in run.recipe.to_json() if name.startswith(("ema", "swa", "average"))]
    written = json.loads((run.folder / "recipe.json").read_text())
    old = {k: v for k, v in written.items() if k not in (*fields, "keep")}
    (run.folder / "recipe.json").write_text(json.dumps(old))
    environment = json.loads((run.folder / "environment.json").read_text())
    (run.folder / "environment.json").write_text(json.dumps({**environment, "ema": 0.5}))
    assert RunFacts(run.folder).recipe() == run.recipe
    assert fastokd.resume(run.folder, quiet=True, max_steps=3).recipe.ema == 0.5


def test_the_flag_is_a_setting() -> None:
    (wanted,) = wanted_runs(NAME, {"ema": 0.99}, parse_settings(["average_start=2"]))
    assert (wanted.recipe.ema, wanted.recipe.averaged) == (0.99, (1,))
    assert wanted.folder == "okddip-branch@2-resnet8-digits-average_start=2-seed0"


def test_the_start_is_scaled_with_the_epochs() -> None:
    long = recipe("dml/resnet8/digits", epochs=300, swa=True, average_start=225)
    assert long.with_epochs(20).average_start == 15
    assert long.with_epochs(1).average_start == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ema": 1.0}, "ema is 1.0: it must be at least 0 and below 1"),
        ({"ema": 0.9, "swa": True}, "a run has one average"),
        ({"average_start": 1}, "average_start is 1, but no weights are averaged"),
        ({"keep": "raw"}, "keep is 'raw', but no weights are averaged"),
        ({"average_students": "all"}, "average_students is 'all', but no weights"),
        ({"ema": 0.9, "average_start": 3}, "average_start is 3, but the run ends after 3"),
        ({"ema": 0.9, "average_every": 0}, "average_every is 0: it must be at least 1"),
        ({"ema": 0.9, "average_norms": "none"}, "choose averaged or recomputed"),
        ({"swa": True, "ema_warmup": False}, "swa has no decay"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        small(**changes)
