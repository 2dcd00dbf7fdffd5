"""What a resumed run ends with is one hash, and all that a run carries along is in it: the loss
scale of fp16, an average of the leader, gradients taken in parts, a clipped norm."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions
from fastokd.train import train
from tests.faults.kill import digest

SMALL = dataclasses.replace(
    recipe("okddip-branch@2/resnet8/digits", epochs=3), batch_size=50, lr=0.05, ema=0.9
)
CARRIED: dict[str, Any] = {"precision": "fp32", "accumulate": 2, "clip_norm": 1.0}
OPTIONS = RunOptions(engine="loop", device="cpu", quiet=True, **CARRIED)


@pytest.fixture(autouse=True, scope="module")
def _scaled() -> Iterator[None]:
    """fp16's loss scale, which grows every third step, in fp32: on CPUs fp16 takes minutes."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=1024.0, growth_interval=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastokd.learner.learner.gradient_scaler", lambda *_: scaler())
        patch.setattr("fastokd.report.page.report", lambda runs, **how: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, _scaled: None) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(SMALL, OPTIONS, out=out)
    return out


def test_all_that_a_run_carries_is_resumed(whole: Path, tmp_path: Path) -> None:
    """Stopped within the first epoch, within the second and at its end."""
    for number, stop in enumerate((1, 3, 4)):
        train(SMALL, OPTIONS, out=tmp_path / "run", max_steps=stop, resume=number > 0)
    # Other random numbers are drawn in between, as another process would.
    torch.manual_seed(99)
    train(SMALL, OPTIONS, out=tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_nothing_that_is_carried_is_left_out_of_the_hash(whole: Path, tmp_path: Path) -> None:
    """Each of them changed by itself, the hash is another."""
    wanted = digest(whole)
    path, tensors, facts, _ = newest_checkpoint(whole / "checkpoints")
    kinds = {name.split(".")[0] for name in tensors}
    assert {"cohort", "optim", "ema", "rng"} <= kinds
    assert facts["scaler"]["scale"] == 4096  # grown twice in six steps
    running = next(name for name in tensors if name.endswith("running_var"))
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"scaler": {**facts["scaler"], "scale": 3.0}}),
        ({}, {"epoch": facts["epoch"] + 1}),
        ({}, {"best": 0.0}),
        ({running: tensors[running] + 1}, {}),
    ]
    for kind in ("optim", "ema", "rng"):
        name = next(n for n in tensors if n.startswith(f"{kind}.") and tensors[n].dim())
        changes.append(({name: tensors[name] + 1}, {}))
    for number, (changed, said) in enumerate(changes):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        save_checkpoint(copy / "checkpoints" / path.name, {**tensors, **changed}, {**facts, **said})
        assert digest(copy) != wanted, (list(changed), list(said))


def test_the_last_two_and_the_best_are_kept(whole: Path) -> None:
    found = {kind: list_checkpoints(whole / "checkpoints", kind) for kind in ("last", "best")}
    assert [path.name for path in found["last"]] == ["last-000000006", "last-000000004"]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    scores = [row["val"]["leader_top1"] for row in rows]
    best = rows[scores.index(max(scores))]
    assert [path.name for path in found["best"]] == [f"best-{best['step']:09d}"]
    assert load_checkpoint(found["best"][0])[1]["step"] == best["step"]
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {
        path.name for paths in found.values() for path in paths
    }
