"""Runs end to end on the digits: what is written, what comes back, what resumes."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastokd
from fastokd.checkpoint import list_checkpoints, newest_checkpoint
from fastokd.cohort import Cohort
from fastokd.data import load_dataset
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator
from fastokd.learner import build as parts
from fastokd.learner import optimizers
from fastokd.learner.state import as_state
from fastokd.learner.step import training_step
from fastokd.models import create_model
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import folder as run_folder
from fastokd.run.build import build
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions

QUICK = {"quiet": True, "precision": "fp32", "engine": "loop"}


def small(name: str = "okddip-branch/resnet8/digits", epochs: int = 2, **changes: object) -> Recipe:
    return recipe(name, epochs=epochs, **{"students": 3, "batch_size": 50, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fastokd.train(small(), out=tmp_path_factory.mktemp("runs") / "whole", **QUICK)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return newest_checkpoint(run.folder / "checkpoints")[1]


def facts_of(run: Run) -> dict[str, Any]:
    return newest_checkpoint(run.folder / "checkpoints")[2]


def best_of(run: Run) -> list[str]:
    return [path.name for path in list_checkpoints(run.folder / "checkpoints", "best")]


def test_a_run_folder_holds_what_it_should(finished: Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "recipe.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "student.safetensors",
        "report.html",
    } <= names
    rows = [
        json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert {"seconds", "images_per_second", "lr", "kd_weight", "train", "test"} <= row.keys()
        assert "val" in row
        for split in ("train", "val", "test"):
            assert len(row[split]["student_top1"]) == 3
            assert 0 <= row[split]["leader_top1"] <= 1
            assert row[split]["diversity"] > 0
        assert torch.tensor(row["test"]["attention"]).shape == (3, 3)
        assert row["train"]["loss"] > 0
    assert Recipe.from_json(json.loads((finished.folder / "recipe.json").read_text())) == small()


def test_the_student_is_the_leader_alone(finished: Run) -> None:
    kept = load_file(finished.folder / "student.safetensors")
    leader = {k: v for k, v in state_of(finished).items() if k.startswith("cohort.students.2.")}
    assert set(kept) == set(fastokd.Cohort(("resnet8", 1), 10).student_state(0))
    for key, value in leader.items():
        torch.testing.assert_close(kept[key.removeprefix("cohort.students.2.")], value)


def test_evaluate_gives_the_last_epochs_numbers(finished: Run) -> None:
    options = RunOptions(**QUICK)
    for what in (finished.folder, next((finished.folder / "checkpoints").glob("last-*4"))):
        again = fastokd.evaluate(what, options=options)
        assert again["test"] == finished.last["test"]


def test_the_kept_student_alone_scores_what_the_run_says(finished: Run) -> None:
    """A plain model with the kept weights, normalised here, in eval mode, image by image."""
    data = load_dataset("digits")
    model = create_model("resnet8", 10).eval()
    model.load_state_dict(load_file(finished.folder / "student.safetensors"))
    x_BCHW = data.test.images_NHWC.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    with torch.no_grad():
        logits_BC = torch.cat([model(part) for part in ((x_BCHW - mean) / std).split(100)])
    right = (logits_BC.argmax(1) == data.test.labels_N).double().mean().item()
    assert right == pytest.approx(finished.last["test"]["leader_top1"], abs=2e-3)


def test_evaluating_moves_nothing(tmp_path: Path) -> None:
    """Nor the running statistics of students, nor those of a method (ONE's gate has some)."""
    session = build(small("one/resnet8/digits"), RunOptions(**QUICK))
    before = {key: value.clone() for key, value in session.state()[0].items()}
    Evaluator(session)()
    for key, value in session.state()[0].items():
        assert torch.equal(value, before[key]), key
    assert session.learner.cohort.training
    assert session.learner.method.training


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_is_uninterrupted(finished: Run, tmp_path: Path, stop: int) -> None:
    """Stopped after any step, at an epoch's end or within one, and continued: the same end."""
    fastokd.train(small(), out=tmp_path / "run", max_steps=stop, **QUICK)
    run = fastokd.train(small(), out=tmp_path / "run", resume=True, **QUICK)
    ours, theirs = state_of(run), state_of(finished)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert run.last["test"] == finished.last["test"]
    assert [row["epoch"] for row in run.metrics] == [0, 1]
    assert run.last["train"] == finished.last["train"]
    assert facts_of(run)["best"] == facts_of(finished)["best"]
    assert best_of(run) == best_of(finished)


def test_max_steps_that_are_taken_already_train_nothing(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    fastokd.train(small(), out=tmp_path / "cut", max_steps=2, **QUICK)
    run = fastokd.train(small(), out=tmp_path / "cut", resume=True, max_steps=1, **QUICK)
    assert [row["step"] for row in run.metrics] == [2]
    run = fastokd.train(small(), out=tmp_path / "run", resume=True, **QUICK)
    assert run.metrics == finished.metrics
    # Within an epoch, whose row would otherwise be written again.
    cut = fastokd.train(small(), out=tmp_path / "within", max_steps=1, **QUICK)
    run = fastokd.train(small(), out=tmp_path / "within", resume=True, max_steps=1, **QUICK)
    assert [row["step"] for row in run.metrics] == [1]
    assert run.metrics == cut.metrics


def test_a_network_cohort_and_lone_students_train(tmp_path: Path) -> None:
    for name in ("okddip-network", "ind"):
        run = fastokd.train(
            small(f"{name}/resnet8/digits", students=2), out=tmp_path / name, max_steps=2, **QUICK
        )
        assert run.last["train"]["loss"] > 0
    lone = recipe("baseline/resnet8/digits", batch_size=50)
    run = fastokd.train(lone, out=tmp_path / "lone", max_steps=2, **QUICK)
    assert run.last["test"]["leader_top1"] is None
    assert run.last["test"]["diversity"] is None


def test_one_batch_can_be_learnt_by_heart(tmp_path: Path) -> None:
    run = fastokd.train(
        small(epochs=12, students=2, batch_size=24),
        out=tmp_path / "run",
        overfit_batch=True,
        max_steps=40,
        eval_every=99,
        **QUICK,
    )
    assert run.last["train"]["mean_top1"] > 0.9


def test_bf16_trains(tmp_path: Path) -> None:
    run = fastokd.train(small(), out=tmp_path / "run", max_steps=1, quiet=True, precision="bf16")
    assert run.last["train"]["loss"] > 0
    assert not any(value.dtype == torch.bfloat16 for value in state_of(run).values())


def test_counts_of_an_optimizer_come_back_where_its_parameters_are() -> None:
    """Adam's ``step``, which a fused step reads on the device."""
    parameter = torch.empty(2, 3, device="meta")
    assert as_state(torch.tensor(7.0), parameter).device == parameter.device


def test_the_schedule_reaches_the_optimizer() -> None:
    session = build(small(epochs=300), RunOptions(**QUICK))
    for epoch, lr in ((0, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (299, 0.001)):
        session.epoch = epoch
        session.begin_epoch()
        group = session.learner.optimizers[0].param_groups[0]
        assert group["lr"].item() == pytest.approx(lr)
        assert group["weight_decay"] == 5e-4
        assert group["nesterov"]
        assert group["fused"]


def test_the_ramp_reaches_the_loss() -> None:
    session = build(small(epochs=300), RunOptions(**QUICK))
    ramp = session.learner.progress.ramp
    for epoch, weight in ((0, 0.006737947), (40, 0.2865048), (80, 1.0), (299, 1.0)):
        session.epoch = epoch
        session.begin_epoch()
        assert session.learner.progress.ramp is ramp  # in place: a captured step reads this tensor
        assert ramp.item() == pytest.approx(weight)


def test_images_per_second_counts_images(tmp_path: Path) -> None:
    """A ragged last batch isn't a whole one: 100 images an epoch, in batches of 60 and 40."""
    run = fastokd.train(small(students=2, batch_size=60, epochs=1), out=tmp_path / "run", **QUICK)
    assert run.last["images_per_second"] * run.last["seconds"] == pytest.approx(100)


def test_rates_of_an_optimizer_that_takes_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA apex's: a stand-in, with its signatures."""

    class FusedSGD(torch.optim.SGD):
        def zero_grad(self) -> None:  # type: ignore[override]
            super().zero_grad()

    made = []

    def create(kind: str, groups: list[dict[str, Any]], of: Recipe) -> torch.optim.Optimizer:
        for group in groups:
            group["lr"] = float(group["lr"])
        made.append(FusedSGD(groups, momentum=of.momentum, nesterov=of.nesterov))
        return made[0]

    monkeypatch.setattr(parts, "create_optimizer", create)
    session = build(small(epochs=300, students=2, batch_size=8), RunOptions(**QUICK))
    session.epoch = 225
    session.begin_epoch()
    session.begin_step(8)
    training_step(session.learner, *session.stream.batch(0, 0))
    assert made[0].param_groups[0]["lr"] == pytest.approx(0.001)
    assert all(p.grad is None for p in session.learner.cohort.parameters())


def test_apex_is_given_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its FusedSGD is torch's own here, whose defaults are apex's: no momentum, no Nesterov."""
    apex = types.ModuleType("apex.optimizers")
    apex.FusedSGD = torch.optim.SGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr(optimizers, "apex_missing", lambda: None)
    group = {"params": [torch.zeros(2)], "lr": torch.tensor(0.5), "weight_decay": 0.25}
    made = optimizers.create_optimizer("apex-sgd", [group], small(momentum=0.75, nesterov=True))
    (found,) = made.param_groups
    told = {name: found[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    assert told == {"lr": 0.5, "momentum": 0.75, "nesterov": True, "weight_decay": 0.25}
    assert isinstance(found["lr"], float)


class TestRefusals:
    def test_an_existing_folder_is_never_overwritten(self, finished: Run) -> None:
        before = (finished.folder / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="--resume"):
            fastokd.train(small(), out=finished.folder, **QUICK)
        assert (finished.folder / "metrics.jsonl").read_bytes() == before

    def test_a_checkpoint_of_another_recipe(self, finished: Run) -> None:
        with pytest.raises(UserError, match=r"another recipe: it differs in lr \(0.1 there, 0.2"):
            fastokd.train(small(lr=0.2), out=finished.folder, resume=True, **QUICK)

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no run to resume"):
            fastokd.train(small(), out=tmp_path / "none", resume=True, **QUICK)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="can't be made"):
            fastokd.train(small(), out=tmp_path / "file" / "run", **QUICK)

    def test_a_batch_larger_than_the_set_leaves_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="101"):
            fastokd.train(small(batch_size=101), out=tmp_path / "run", **QUICK)
        assert not (tmp_path / "run").exists()

    def test_apex_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="apex"):
            fastokd.train(small(), out=tmp_path / "run", apex=True, **QUICK)

    def test_apex_of_another_make(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(optimizers.metadata, "version", lambda name: "0.9.10dev")
        assert "isn't NVIDIA's" in (optimizers.apex_missing() or "")

    @pytest.mark.parametrize(
        ("tensors", "facts"),
        [
            ({"cohort.students.0.fc.weight": torch.zeros(3, 3)}, {}),
            ({"cohort.more": torch.zeros(1)}, {}),
            ({"rng.cpu": torch.zeros(3)}, {}),
            ({"optim.cohort.students.0.fc.weight:momentum_buffer": torch.zeros(1)}, {}),
            ({"optim.nobody:momentum_buffer": torch.zeros(1)}, {}),
            ({}, {"epoch": "one"}),
            ({}, {"recipe": None}),
            ({}, {"class_names": ["zero", "one"]}),
            ({}, {"mean": [0.0, 0.0, 0.0]}),
        ],
        ids=lambda change: ",".join(change) or None,
    )
    def test_a_checkpoint_that_does_not_fit(
        self, finished: Run, tensors: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Whole by its digests, and of another network, other data, or nobody's."""
        _, whole, known, _ = newest_checkpoint(finished.folder / "checkpoints")
        session = build(small(), RunOptions(**QUICK))
        with pytest.raises(UserError, match="the checkpoint"):
            session.load_state({**whole, **tensors}, {**known, **facts})

    def test_a_run_keeps_the_statistics_that_it_began_with(
        self, finished: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a folder they move a little with the version that measures them."""
        _, tensors, facts, _ = newest_checkpoint(finished.folder / "checkpoints")
        mean = [value + 0.004 for value in facts["mean"]]
        session = build(small(), RunOptions(**QUICK))
        session.load_state(tensors, facts)
        assert capsys.readouterr().err == ""
        session.load_state(tensors, {**facts, "mean": mean})
        assert "the run keeps its values" in capsys.readouterr().err
        assert session.data.mean == tuple(mean)
        theirs = Cohort(("resnet8", 1), 10, sharing="network", mean=mean, std=facts["std"])
        assert torch.equal(session.learner.cohort.shift_C, theirs.shift_C)
        assert session.state()[1]["mean"] == mean

    def test_one_batch_is_not_resumed_as_a_whole_set(self, finished: Run) -> None:
        with pytest.raises(UserError, match="--overfit-batch"):
            fastokd.train(small(), out=finished.folder, resume=True, overfit_batch=True, **QUICK)

    @pytest.mark.parametrize("line", ["{", "[]", "\udcff"])
    def test_metrics_that_are_damaged(self, tmp_path: Path, line: str) -> None:
        data = f"{line}\n".encode(errors="surrogateescape")
        (tmp_path / "metrics.jsonl").write_bytes(data)
        with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
            run_folder.RunFolder(tmp_path).metrics()

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_folder, "save_checkpoint", full)
        with pytest.raises(UserError, match=r"can't be written: .*No space left"):
            fastokd.train(small(students=2), out=tmp_path / "run", max_steps=1, **QUICK)

    @pytest.mark.parametrize("what", ["no-such-run", "."])
    def test_nothing_to_evaluate(self, what: str, tmp_path: Path) -> None:
        with pytest.raises(UserError):
            fastokd.evaluate(tmp_path / what)


def test_ranks_that_resume_a_captured_run_join_as_for_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL reads its settings before the ranks join, and the run folder after it."""
    asked: list[bool] = []

    @contextmanager
    def joined(_device: str, capture: bool) -> Iterator[None]:
        asked.append(capture)
        yield

    module = importlib.import_module("fastokd.train")
    monkeypatch.setattr(module, "joined", joined)
    monkeypatch.setattr(module, "_train", lambda *_: None)
    (tmp_path / "environment.json").write_text('{"capture": true}')
    one = recipe("baseline/resnet8/digits")
    for how in ({"resume": True}, {"resume": False}, {"capture": True}):
        fastokd.train(one, out=tmp_path, **how)
    assert asked == [True, False, True]
