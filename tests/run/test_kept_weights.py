"""Which weights are a run's, and what is said of them: one decision, whoever asks."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastokd
from fastokd.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fastokd.cli import run_command
from fastokd.data import BatchStream, read_all
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator, evaluate
from fastokd.export import export
from fastokd.learner.average import Average
from fastokd.learner.step import training_step
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.folder import Run, RunFolder
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.summary import summarise
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT, Weights
from fastokd.student.within_cohort import first_images, within_cohort

QUICK: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop", "device": "cpu"}


def small(**changes: Any) -> Recipe:
    """Two steps an epoch."""
    return recipe("okddip-branch@2/resnet8/digits", **{"epochs": 3, "batch_size": 50, **changes})


def take(session: Session) -> None:
    assert isinstance(session.stream, BatchStream)
    images, labels = session.stream.batch(0, session.step % 2)
    session.begin_epoch()
    session.begin_step(len(labels))
    training_step(session.learner, images, labels)
    session.step, session.batch = session.step + 1, session.batch + 1


def gone_on(run: Path, steps: int) -> RunFolder:
    """The run resumed and stopped after some steps, as by SIGTERM."""
    folder = RunFolder(run)
    session = build(folder.recipe(), folder.as_begun(RunOptions(**QUICK, out=run, resume=True)))
    folder.open(session)
    for _ in range(steps):
        take(session)
        folder.save(session)
    folder.close()
    return folder


@pytest.fixture(autouse=True, scope="module")
def _without_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastokd.report.page.report", lambda runs, **how: None)
        yield


@pytest.fixture(scope="module", name="plain")
def fixture_plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An epoch of three: its student is of step 2."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return fastokd.train(small(), out=out, max_steps=2, **QUICK)


@pytest.fixture(scope="module", name="averaged")
def fixture_averaged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("averaged") / "run"
    return fastokd.train(small(epochs=2, lr=0.02, ema=0.5), out=out, **QUICK)


def copied(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder, tmp_path / "run"))


def of_step(weights: Weights) -> int:
    return int(weights.fact("step"))


def without_step(file: Path) -> None:
    """As a file was written that doesn't say its step."""
    weights = read_weights(file)
    facts = {k: v for k, v in weights.facts.items() if k not in ("step", "ema", "score", "recipe")}
    file.write_bytes(Weights(file, weights.state, facts).to_bytes())


def spoil(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{}")


@pytest.mark.parametrize("says_its_step", [True, False])
def test_a_student_of_before_the_newest_checkpoint_is_not_used(
    plain: Run, tmp_path: Path, says_its_step: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(plain, tmp_path)
    if not says_its_step:
        without_step(run / STUDENT)
    gone_on(run, 2)
    saved = run / "checkpoints" / "last-000000004"
    tensors = load_checkpoint(saved)[0]
    for student in (None, 1):
        found = read_weights(run, student=student)
        assert found.path == saved
        assert of_step(found) == 4
        assert torch.equal(found.state["fc.weight"], tensors["cohort.students.1.fc.weight"])
    assert ("but the run continued" in capsys.readouterr().err) == says_its_step
    done = export(run, "safetensors")
    assert f"from {saved}" in done.lines[0]
    assert of_step(read_weights(done.folder / "resnet8.safetensors")) == 4
    begun = build(small(), RunOptions(**QUICK, init=(str(run),)))
    ours = begun.learner.cohort.student_state(1)["layer3.0.conv1.weight"]
    assert torch.equal(ours, tensors["cohort.students.1.layer3.0.conv1.weight"])


def test_a_damaged_checkpoint_is_told_of_and_the_newest_whole_weights_are_used(
    plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(plain, tmp_path)
    gone_on(run, 2)
    spoil(run / "checkpoints" / "last-000000004")
    readers: list[tuple[Callable[[], Any], str]] = [
        (lambda: export(run, "hub"), "last-000000003"),
        (lambda: read_weights(run, student=0), "last-000000003"),
        (lambda: evaluate(run, options=RunOptions(**QUICK)), "last-000000003"),
        (lambda: gone_on(run, 0), "last-000000003"),
    ]
    for read, used in readers:
        capsys.readouterr()
        read()
        lines = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
        assert len(lines) == 1
        assert "last-000000004 is damaged" in lines[0]
        assert f"({used} is used)" in lines[0]
    for path in list_checkpoints(run / "checkpoints"):
        spoil(path)
    capsys.readouterr()
    assert read_weights(run).path == run / STUDENT  # of step 2: all that is whole
    assert f"({STUDENT} is used)" in capsys.readouterr().err
    assert run_command(["convert", str(run), "--student", "1"]) == 2


def test_a_finished_student_outlives_its_damaged_checkpoint(averaged: Run, tmp_path: Path) -> None:
    run = copied(averaged, tmp_path)
    spoil(run / "checkpoints" / "last-000000004")
    assert read_weights(run).path == run / STUDENT
    without_step(run / STUDENT)
    assert read_weights(run).path == run / STUDENT
    assert read_weights(run, student=0).path == run / "checkpoints" / "last-000000002"


def test_a_damaged_checkpoint_does_not_bring_back_an_older_student(
    plain: Run, tmp_path: Path
) -> None:
    """Of a run that went on: the file doesn't say its step, and wasn't written at the run's end."""
    run = copied(plain, tmp_path)
    without_step(run / STUDENT)
    gone_on(run, 2)
    spoil(run / "checkpoints" / "last-000000004")
    assert read_weights(run).path == run / "checkpoints" / "last-000000003"


def test_the_average_is_kept_scored_chosen_and_told(averaged: Run, tmp_path: Path) -> None:
    run, rows = averaged.folder, averaged.metrics
    tensors, facts = load_checkpoint(run / "checkpoints" / "last-000000004")
    first = run / "checkpoints" / "last-000000002"
    best = max(rows, key=lambda row: row["val"]["ema_top1"])
    assert facts["best"] == best["val"]["ema_top1"]
    assert [path.name for path in list_checkpoints(run / "checkpoints", "best")] == [
        f"best-{best['step']:09d}"
    ]
    scores = [row[split] for row in rows for split in ("val", "test")]
    assert any(
        s[f"ema_{top}"] != s[f"student_{top}"][1] for s in scores for top in ("top1", "top5")
    )
    for source, options, row in (
        (run, {}, rows[1]),
        (run, {"student": 1}, rows[1]),
        (run, {"best": True}, best),
        (first, {}, rows[0]),
    ):
        found = read_weights(source, **options)
        where = run / "checkpoints" / f"last-{row['step']:09d}"
        kept = load_checkpoint(where)[0]
        assert torch.equal(found.state["fc.weight"], kept["ema.fc.weight"])
        score = {"split": "test", "top1": row["test"]["ema_top1"], "epoch": row["epoch"] + 1}
        assert found.fact("score") == score
        assert found.fact("ema") == 0.5
        done = export(source, "hub", tmp_path / f"{len(list(tmp_path.iterdir()))}", **options)
        card = (done.folder / "README.md").read_text()
        assert f"after epoch {row['epoch'] + 1}: {100 * score['top1']:.2f} %" in card
        assert "running average" in card
    peer = read_weights(run, student=0)
    assert torch.equal(peer.state["fc.weight"], tensors["cohort.students.0.fc.weight"])
    assert peer.fact("ema") is None
    assert peer.fact("score")["top1"] == rows[1]["test"]["student_top1"][0]
    summary = summarise(averaged)
    assert summary.reported == "average"
    assert (summary.last, summary.best) == (rows[1]["test"]["ema_top1"], best["test"]["ema_top1"])


def test_what_was_not_measured_has_no_score(plain: Run, tmp_path: Path) -> None:
    run = copied(plain, tmp_path)
    gone_on(run, 1)
    done = export(run, "hub")
    assert read_weights(run).fact("score") is None
    assert "top-1" not in (done.folder / "README.md").read_text()
    assert json.loads((done.folder / "student.json").read_text())["score"] is None


@pytest.mark.usefixtures("all_digits")
def test_the_average_is_scored_by_its_own_weights() -> None:
    """Which always says the same class here, and the student itself doesn't."""
    session = build(small(ema=0.9), RunOptions(**QUICK))
    take(session)
    assert session.learner.average is not None
    state = session.learner.average.states[1]
    state["fc.weight"].zero_()
    state["fc.bias"].copy_(torch.arange(10) == 3)
    test = Evaluator(session)()["test"]
    labels_N = read_all(session.data.test)[1]
    assert test["ema_top1"] == pytest.approx((labels_N == 3).float().mean().item())
    assert test["ema_top1"] != test["student_top1"][1]


def test_of_equal_epochs_the_first_is_the_best(averaged: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    session = build(small(), RunOptions(**QUICK, out=folder.path))
    folder.open(session)
    for epoch in range(2):
        session.step, session.epoch = 2 * (epoch + 1), epoch + 1
        row = {**copy.deepcopy(averaged.metrics[0]), "epoch": epoch, "step": session.step}
        folder.record(session, row)
    folder.close()
    assert [p.name for p in list_checkpoints(folder.checkpoints, "best")] == ["best-000000002"]
    run = Run.load(folder.path)
    assert summarise(run).best_epoch == 1


def test_the_best_so_far_is_known_by_what_the_run_is_judged_by(
    averaged: Run, tmp_path: Path
) -> None:
    """A run that chose it by the student itself goes on by the average."""
    run = copied(averaged, tmp_path)
    saved = run / "checkpoints" / "last-000000004"
    tensors, facts = load_checkpoint(saved)
    save_checkpoint(saved, tensors, {**facts, "best": 0.999})
    folder = RunFolder(run)
    options = folder.as_begun(RunOptions(**QUICK, out=run, resume=True))
    session = build(folder.recipe(), options)
    folder.open(session)
    folder.close()
    assert session.best == facts["best"]


def test_the_share_of_a_step_falls_to_what_the_decay_says_and_is_resumed() -> None:
    session = build(small(ema=0.6), RunOptions(**QUICK))
    average = session.learner.average
    assert average is not None
    key = "bn1.running_var"
    expected = average.states[1][key].clone()
    for t in range(3):
        take(session)
        share = max(1 - 0.6, 9 / (10 + t))
        expected += share * (session.learner.cohort.student_state(1)[key] - expected)
    torch.testing.assert_close(average.states[1][key], expected)
    tensors, facts = session.state()
    again = build(small(ema=0.6), RunOptions(**QUICK))
    again.load_state(tensors, facts)
    assert again.learner.average is not None
    assert again.learner.average.updates == 3
    older = {name: value for name, value in tensors.items() if name != "ema_updates"}
    again.load_state(older, facts)
    assert again.learner.average.share() == torch.tensor(1 - 0.6)


def updating(average: Average) -> Callable[[Tensor], Any]:
    def update(x: Tensor) -> Tensor:
        average.update(torch.zeros(()))
        return x

    return update


@pytest.mark.parametrize(
    ("changes", "updates"), [({"ema": 0.99}, 3), ({"swa": True, "average_every": 2}, 1)]
)
def test_a_recorded_update_counts_on(changes: dict[str, Any], updates: int) -> None:
    """What a graph replays holds no number of the step that it was recorded in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    states = []
    for recorded in (False, True):
        session = build(small(**changes), RunOptions(**QUICK))
        average = session.learner.average
        assert average is not None
        step = update = updating(average)
        with torch.no_grad():
            for turn in range(3):
                for parameter in session.learner.cohort.parameters():
                    parameter.add_(0.01)
                if recorded and turn == 0:
                    step = make_fx(update)(torch.zeros(()))  # which takes the first one
                else:
                    step(torch.zeros(()))
        assert average.updates == updates
        states.append(average.states[1])
    torch.testing.assert_close(states[0], states[1])


def test_an_average_far_behind_is_warned_of(
    averaged: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was begun without a warm-up, and then stopped."""
    run = copied(averaged, tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["test"]["ema_top1"] = 0.125
    rows[-1]["test"]["student_top1"][1] = 0.75
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fastokd.train(small(epochs=2, lr=0.02, ema=0.5), out=run, resume=True, **QUICK)
    warned = capsys.readouterr().err
    assert "scores 12.5%, and the student itself 75.0%" in warned
    assert "--ema 0.5" in warned


def test_dropout_goes_on_where_it_stopped() -> None:
    """In a run that is resumed after other numbers were drawn."""
    dropping = recipe("baseline/vgg16/digits", batch_size=4, model_options={"dropout": 0.5})
    options = RunOptions(**QUICK)
    whole = build(dropping, options)
    take(whole)
    tensors, facts = copy.deepcopy(whole.state())
    take(whole)
    torch.manual_seed(99)
    resumed = build(dropping, options)
    torch.manual_seed(99)
    resumed.load_state(tensors, facts)
    take(resumed)
    for (key, ours), theirs in zip(
        resumed.learner.cohort.state_dict().items(),
        whole.learner.cohort.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), key


def test_a_student_that_is_another_alone_is_written_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cohort multiplies its logits, which no file can say."""
    kept: list[Session] = []

    def louder(*given: Any, **named: Any) -> Session:
        session = build(*given, **named)
        head = session.learner.cohort.students[1].get_submodule("fc")
        head.register_forward_hook(lambda module, inputs, output: output * 1.01)
        kept.append(session)
        return session

    monkeypatch.setattr(importlib.import_module("fastokd.train"), "build", louder)
    with pytest.raises(
        UserError, match=r"gives other logits alone than within its cohort: they differ by 0\.0"
    ):
        fastokd.train(small(), out=tmp_path / "run", max_steps=1, **QUICK)
    assert list_checkpoints(tmp_path / "run/checkpoints")
    state = load_file(tmp_path / "run" / STUDENT)
    assert torch.equal(state["fc.weight"], kept[0].learner.cohort.student_state(1)["fc.weight"])


@pytest.mark.parametrize("training", [False, True])
def test_a_cohort_that_was_compared_is_as_it_was(training: bool) -> None:
    session = build(small(), RunOptions(**QUICK))
    images_BHWC = first_images(session.data)
    assert session.data.val is not None
    assert torch.equal(images_BHWC, read_all(session.data.val)[0][:16])
    cohort = session.learner.cohort.train(training)
    before = {key: value.clone() for key, value in cohort.student_state(1).items()}
    other = {key: value * 2 for key, value in before.items()}
    within_cohort(cohort, 1, other, images_BHWC)
    assert cohort.training == training
    assert all(torch.equal(v, before[k]) for k, v in cohort.student_state(1).items())


def test_an_export_compares_the_student_within_its_cohort(plain: Run, tmp_path: Path) -> None:
    run = copied(plain, tmp_path)
    assert "within its cohort, engine loop" in export(run, "safetensors").lines[1]
    weights = read_weights(run)
    weights.state["fc.weight"].mul_(1.1)
    (run / STUDENT).write_bytes(weights.to_bytes())
    with pytest.raises(UserError, match="other logits alone than within its cohort"):
        export(run, "hub")
    assert not (run / "export" / "hub").exists()
