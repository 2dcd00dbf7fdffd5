"""Runs end to end on the digits: what is written, what comes back, what resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastokd
from fastokd.errors import UserError
from fastokd.recipes import Recipe, recipe
from fastokd.run_folder import Run
from fastokd.session import RunOptions, Session

QUICK = {"quiet": True, "precision": "fp32", "engine": "loop"}


def small(name: str = "okddip-branch/resnet8/digits", epochs: int = 2, **changes: object) -> Recipe:
    return recipe(name, epochs=epochs, **{"students": 3, "batch_size": 250, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fastokd.train(small(), out=tmp_path_factory.mktemp("runs") / "whole", **QUICK)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    from fastokd.checkpoint import newest_checkpoint

    return newest_checkpoint(run.folder / "checkpoints")[1]


def test_a_run_folder_holds_what_it_should(finished: Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert {
        "recipe.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "student.safetensors",
        "curves.png",
        "curves.svg",
    } <= names
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
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


def test_a_network_cohort_and_lone_students_train(tmp_path: Path) -> None:
    for name in ("okddip-network", "ind"):
        run = fastokd.train(
            small(f"{name}/resnet8/digits", students=2), out=tmp_path / name, max_steps=2, **QUICK
        )
        assert run.last["train"]["loss"] > 0
    lone = recipe("baseline/resnet8/digits", batch_size=250)
    run = fastokd.train(lone, out=tmp_path / "lone", max_steps=2, **QUICK)
    assert run.last["test"]["leader_top1"] is None
    assert run.last["test"]["diversity"] is None


def test_one_batch_can_be_learnt_by_heart(tmp_path: Path) -> None:
    run = fastokd.train(
        small(epochs=12, students=2, batch_size=64),
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


def test_the_schedule_reaches_the_optimizer() -> None:
    session = Session(small(epochs=300), RunOptions(**QUICK))
    for epoch, lr in ((0, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (299, 0.001)):
        session.epoch = epoch
        session.begin_epoch()
        group = session.optimizers[0].param_groups[0]
        assert group["lr"].item() == pytest.approx(lr)
        assert group["weight_decay"] == 5e-4
        assert group["nesterov"]
        assert group["fused"]


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
        with pytest.raises(UserError, match="501"):
            fastokd.train(small(batch_size=501), out=tmp_path / "run", **QUICK)
        assert not (tmp_path / "run").exists()

    def test_apex_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="apex"):
            fastokd.train(small(), out=tmp_path / "run", optimizer="apex-sgd", **QUICK)

    def test_apex_of_another_make(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastokd import optimizers

        monkeypatch.setattr(optimizers.metadata, "version", lambda name: "0.9.10dev")
        assert "isn't NVIDIA's" in (optimizers.apex_missing() or "")

    def test_a_loss_that_is_nan(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="loss is (nan|inf)"):
            fastokd.train(small(lr=1e30, students=2), out=tmp_path / "run", **QUICK)

    @pytest.mark.parametrize("what", ["no-such-run", "."])
    def test_nothing_to_evaluate(self, what: str, tmp_path: Path) -> None:
        with pytest.raises(UserError):
            fastokd.evaluate(tmp_path / what)
