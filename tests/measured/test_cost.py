"""The parts of a step are measured beside the run, which they leave as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

import fastokd
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.measured import answers, cost
from fastokd.measured.cost import PARTS, cost_of, per_step, read_cost
from fastokd.measured.measure import measure
from fastokd.recipe.names import recipe
from fastokd.report import page
from fastokd.result import Run
from fastokd.run.beside import beside


@pytest.fixture(scope="module", autouse=True)
def _measured() -> Iterator[None]:
    """Pages are measured for, but have no figures; few steps are timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "measure", measure)
        patch.setattr(cost, "WARM_UP", 1)
        patch.setattr(cost, "TIMED", 2)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _measured: None) -> Run:
    """Its last batch is smaller than the others, and each is taken in two parts."""
    small = recipe("okddip-branch@2/resnet8/digits", epochs=1, batch_size=16, fraction=0.4)
    out = tmp_path_factory.mktemp("measured") / "run"
    return fastokd.train(small, out=out, device="cpu", quiet=True, accumulate=2)


def contents(run: Run) -> dict[str, bytes]:
    """The files of a run but for what is measured of it and its report."""
    return {
        str(path.relative_to(run.folder)): path.read_bytes()
        for path in run.folder.rglob("*")
        if path.is_file()
        and path.name not in (cost.FILE, answers.FILE)
        and not path.name.startswith("report")
    }


def test_a_run_ends_with_its_answers_and_its_cost(run: Run) -> None:
    found = read_cost(run)
    assert found is not None
    assert tuple(found.seconds) == PARTS
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert (found.step, found.batch, found.how) == (run.last["step"], 16, "measured-cpu")
    precision = json.loads((run.folder / "environment.json").read_text())["precision"]
    assert (found.device, found.precision, found.engine) == ("cpu", precision, "loop")
    assert found.steps == cost.TIMED
    assert found.seconds["backward"] > found.seconds["loss"]
    known = answers.read_answers(run)
    assert known is not None
    assert known.accuracy(known.kept) == run.last["test"]["leader_top1"]


def test_measuring_changes_nothing_of_the_run(run: Run) -> None:
    torch.manual_seed(7)  # not as at the run's beginning
    before, random = contents(run), torch.get_rng_state()
    (run.folder / cost.FILE).unlink()
    again = cost_of(run)
    assert again == read_cost(run)
    assert contents(run) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_the_parts_are_those_of_the_step(run: Run) -> None:
    """A measured step and the loop's have the same bits."""
    ends = []
    for measured in (True, False):
        with beside(run, None, None, training=True) as session:
            watch = cost._Watch(session.learner.device)
            if measured:
                cost._attach(watch, session)
                assert next(cost._steps(session, watch)) == 16
                assert set(watch.laps) == set(PARTS)
            else:
                session.epoch, session.batch = session.last_epoch, 0
                session.learner.train()
                session.begin_epoch()
                B, *batch = next(session.batches(lambda: None))
                session.learner.guard.begin()
                session.whole_step(session.learner, B, *batch)
            ends.append(session.state()[0])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_only_whole_batches_are_measured(run: Run) -> None:
    with beside(run, None, None, training=True) as session:
        assert len({session.stream.size(i) for i in range(len(session.stream))}) == 2  # type: ignore[attr-defined]
        watch = cost._Watch(session.learner.device)
        steps = cost._steps(session, watch)
        assert [next(steps) for _ in range(4)] == [16] * 4


@pytest.mark.parametrize("damage", ["", "[]", '{"step": 1}', "half"])
def test_a_damaged_or_stale_file_is_none(run: Run, damage: str) -> None:
    path, found = run.folder / cost.FILE, cost_of(run)
    whole = json.dumps(asdict(found))
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    assert read_cost(run) is None
    path.write_text(json.dumps(asdict(replace(found, step=found.step + 1))))
    assert read_cost(run) is None
    path.write_text(whole)
    assert read_cost(run) == found


def test_a_slow_step_is_timed_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PATIENCE", 0.0)
    monkeypatch.setattr(cost, "WARM_UP", 3)
    with beside(run, None, None, training=True) as session:
        assert cost._measured(session).steps == 1
        assert session.step == run.last["step"] + 1  # the first step is done, the second was timed


def test_the_runs_own_seconds(run: Run) -> None:
    (row,) = run.metrics
    own = per_step(run)
    assert own.keys() == {
        "training",
        "evaluation",
    }  # the digits are in memory: no loader is waited for
    assert own["training"] == 16 / row["images_per_second"]
    assert own["evaluation"] == row["eval_seconds"] / row["step"]
    assert row["eval_seconds"] > 0


def test_what_cannot_be_measured_is_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the data are gone: put them back")

    for name in ("answers_of", "cost_of"):
        monkeypatch.setattr(f"fastokd.measured.measure.{name}", refuse)
    path = page.report([run.folder])
    assert path.is_file()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(
        "the data are gone: put them back" in line and "fastokd report" in line for line in said
    )


def test_the_command_measures_what_is_missing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (cost.FILE, answers.FILE):
        (run.folder / name).unlink()
    assert run_command(["report", str(run.folder), "--device", "cpu"]) == 0
    assert read_cost(run) is not None
    assert answers.read_answers(run) is not None
    assert capsys.readouterr().err == ""
