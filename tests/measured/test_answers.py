"""The answers of a run's students are those that its metrics count, and a file that isn't theirs is replaced."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastokd
from fastokd.checkpoint import load_checkpoint
from fastokd.data import Split, load_dataset
from fastokd.errors import UserError
from fastokd.measured import answering
from fastokd.measured.answering import answers_of
from fastokd.measured.answers import BINS, FILE, Answers, read_answers
from fastokd.recipe.names import recipe
from fastokd.result import Run

# Each with what names its rows: a leader; an average that is kept; a companion that is kept; mirrored images.
RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "leader": (
        "okddip-branch@3/resnet8/digits",
        {"test_flip": True, "flip": True},
        ("student 0", "student 1", "leader", "ensemble"),
    ),
    "average": (
        "dml@2/resnet8/digits",
        {"ema": 0.5, "average_norms": "recomputed"},
        ("student 0", "student 1", "average of student 0", "ensemble"),
    ),
    "companion": ("okdph/resnet8/digits", {}, ("student 0", "student 1", "companion", "ensemble")),
    "alone": ("baseline/resnet8/digits", {}, ("student 0",)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        key: fastokd.train(
            recipe(name, epochs=1, batch_size=10, lr=0.02, **changes),
            out=folder / key,
            device="cpu",
            quiet=True,
        )
        for key, (name, changes, _) in RUNS.items()
    }


@pytest.fixture
def alone(made: dict[str, Run], tmp_path: Path) -> Run:
    """A copy of the run of one student."""
    shutil.copytree(made["alone"].folder, tmp_path / "run")
    return Run.load(tmp_path / "run")


@pytest.mark.parametrize("key", RUNS)
def test_the_rows_have_the_accuracies_of_the_metrics(made: dict[str, Run], key: str) -> None:
    torch.manual_seed(7)  # not as at the run's beginning
    run, before = made[key], torch.get_rng_state()
    found, test = answers_of(run), run.last["test"]
    assert torch.equal(torch.get_rng_state(), before)
    assert found.names == RUNS[key][2]
    tops = [found.accuracy(row) for row in range(len(found.names))]
    own = test["student_top1"] + test.get("companion_student_top1", [])
    own += [test["ema_top1"]] if "ema_top1" in test else []
    assert tops == own + [test["ensemble_top1"]] * (len(own) > 1)
    assert found.accuracy(found.kept) == run.recipe.score(test)
    assert len({tuple(row) for row in found.choice_MN.tolist()}) == len(tops)
    again = read_answers(run)
    assert again is not None
    for name, value in vars(found).items():
        other = getattr(again, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


def test_what_is_counted_of_them(made: dict[str, Run]) -> None:
    found = answers_of(made["leader"])
    data = load_dataset("digits")
    assert torch.equal(found.labels_N, data.test.labels_N)
    assert found.classes == tuple("0123456789")
    accuracy_C, count_C = found.by_class(3)
    assert count_C.tolist() == [10] * 10
    assert accuracy_C.mean().item() == pytest.approx(found.accuracy(3))
    confusion_CC = found.confusion_CC(3)
    assert torch.equal(confusion_CC.sum(1), count_C)
    assert torch.equal(confusion_CC.diagonal().double() / count_C, accuracy_C)
    mistakes = found.mistakes(3, 1000)
    assert len(mistakes) == 100 - confusion_CC.trace()
    sure = found.confidence_MN[3, mistakes]
    assert torch.equal(sure, sure.sort(descending=True).values)
    # The pictures are those of the kept student's mistakes, as the data set holds them.
    shown = found.pictures()
    assert list(shown) == found.mistakes(found.kept, answering.PICTURED)
    assert isinstance(data.test, Split)
    for index, png in [*shown.items()][:3]:
        image_HWC = torch.frombuffer(
            bytearray(Image.open(io.BytesIO(png)).tobytes()), dtype=torch.uint8
        )
        assert torch.equal(image_HWC, data.test.images_NHWC[index].flatten())
    assert (made["leader"].folder / FILE).stat().st_size < 120_000


def test_the_calibration_error_by_hand() -> None:
    """Confidences 0.9, 0.9 (one right) and 0.5 (right): (2 |1/2 - 0.9| + |1 - 0.5|) / 3. No answer is the
    first bin's and wrong."""
    choice_1N, confidence_1N = torch.tensor([[0, 1, 0, -1]]), torch.tensor([[0.9, 0.9, 0.5, 0.0]])
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
    labels_N = torch.tensor([0, 0, 0, 1])
    four = Answers(
        1, labels_N, choice_1N, confidence_1N, ("student 0",), 0, ("a", "b"), "fp32", "how", *none
    )  # fmt: skip
    cut = {name: getattr(four, name)[:, :3] for name in ("choice_MN", "confidence_MN")}
    found = replace(four, labels_N=labels_N[:3], **cut).calibration(0)
    assert found.ece == pytest.approx((2 * 0.4 + 0.5) / 3)
    assert (len(found.count), found.count[13], found.count[7]) == (BINS, 2, 1)
    assert four.calibration(0).count[0] == 1
    assert four.accuracy(0) == 0.5
    assert four.confusion_CC(0).tolist() == [[2, 1], [0, 0]]
    assert four.mistakes(0, 5) == [1, 3]


def test_a_label_ranks_as_the_metrics_count() -> None:
    """Ties by index, and no answer where a logit isn't a number."""
    nan = torch.nan
    logits_SBC = torch.tensor([[[1.0, 1, 0], [0, 1, 1], [nan, 1, 0], [0, 1, nan]]])
    choice_1B, sure_1B = answering._answered({"students": logits_SBC}, 1)
    assert choice_1B.tolist() == [[0, 1, -1, -1]]
    assert sure_1B[0, 2:].tolist() == [0.0, 0.0]


def damage(run: Run, how: str) -> None:
    """Makes the file of a run's answers one that isn't theirs."""
    path = run.folder / FILE
    found = answers_of(run)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "half a header":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "without facts":
        save_file(load_file(path), path)
    elif how == "another step":
        path.write_bytes(replace(found, step=found.step - 1).to_bytes())
    elif how == "another shape":
        path.write_bytes(replace(found, choice_MN=found.choice_MN[:, 1:]).to_bytes())
    elif how == "a class too many":
        path.write_bytes(replace(found, labels_N=found.labels_N + 1).to_bytes())


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "half a header",
        "without facts",
        "another step",
        "another shape",
        "a class too many",
    ],
)
def test_a_damaged_or_stale_file_is_replaced(made: dict[str, Run], how: str) -> None:
    run = made["alone"]
    damage(run, how)
    assert read_answers(run) is None
    assert answers_of(run).accuracy(0) == run.last["test"]["student_top1"][0]
    assert read_answers(run) is not None


def test_measuring_leaves_the_checkpoint(alone: Run) -> None:
    newest = next((alone.folder / "checkpoints").glob("last-*"))
    before = load_checkpoint(newest)[0]
    names = {path.name for path in alone.folder.iterdir()}
    (alone.folder / FILE).unlink(missing_ok=True)
    answers_of(alone)
    assert {path.name for path in alone.folder.iterdir()} == names | {FILE}
    after = load_checkpoint(newest)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_without_a_checkpoint_the_error_is_one_sentence(alone: Run) -> None:
    (alone.folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(alone.folder / "checkpoints")
    (alone.folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"there is no checkpoint in .*: only the student"):
        answers_of(alone)


def test_pictures_of_large_images_are_shrunk() -> None:
    split = Split(
        torch.arange(2 * 90 * 120 * 3).view(2, 90, 120, 3).to(torch.uint8), torch.zeros(2).long()
    )
    assert answering._images(split, torch.tensor([1])).shape == (1, 48, 64, 3)
