"""Students on several processes, alone and with the batch shared too: the numbers of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.distributed.ranks import Line, Ranks, student_columns
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe
from tests.distributed import checks
from tests.distributed.checks import averaged, modern, small
from tests.distributed.pool import Pool
from tests.distributed.test_data_parallel import assert_same_steps

# A process that a test starts has all of them.
pytestmark = pytest.mark.usefixtures("all_digits")

SHARED: dict[str, Any] = {"parallel": "students"}


# Attention and its projections, fixed scores, maps with fusion, decoders and a leader's transfusion, embeddings;
# three students on two processes: two and one.
@pytest.mark.parametrize("name", ["okddip-network", "dml", "ffsd", "mcl"])
def test_two_processes_train_what_one_does(two: Pool, name: str) -> None:
    """In training mode: every student sees the whole batch."""
    assert_same_steps(two, small(name), 2, frozen=False, clip_norm=0.5, **SHARED)


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_each_process_stacks_its_own_students(two: Pool, engine: str) -> None:
    assert_same_steps(two, small("dml"), 2, frozen=False, engine=engine, **SHARED)


def test_each_process_augments_its_own_students_views(two: Pool) -> None:
    one = small("okddip-network", views="student")
    assert_same_steps(two, one, 2, frozen=False, **SHARED)
    assert two.run(checks.views, one, SHARED) == [(0, 1), (2,)]


@pytest.mark.parametrize(
    ("one", "options"),
    [
        (modern("okddip-network", optimizer="lamb", balanced=True), {"accumulate": 2}),
        pytest.param(
            modern("ffsd", optimizer="adamw", views="shared", students=3, repeats=3),
            {"checkpoint_activations": True, "clip_norm": 0.5},
            marks=pytest.mark.proof,
        ),
    ],
)
def test_modern_settings_train_what_one_process_does(
    two: Pool, pictures: Path, one: Recipe, options: dict[str, Any]
) -> None:
    """Views, mixed images, rates by step, frozen stages, averages of students on both: two epochs."""
    how = {"data_root": pictures, **options, **SHARED}
    assert_same_steps(two, one, 4, frozen=False, steps=checks.looped, **how)


def test_recomputed_statistics_are_of_the_first_view(two: Pool, pictures: Path) -> None:
    """Which the second rank, with the second student's view, doesn't have."""
    one = averaged()
    options = {"data_root": pictures}
    wanted = checks.looped(one, 2, False, options, True)
    for found in two.run(checks.looped, one, 2, False, {**options, **SHARED}, True):
        for name in ("ema.bn1.running_mean", "ema1.bn1.running_var"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_what_students_share_counts_once_in_the_norm(two: Pool) -> None:
    """Projections with most of the gradient: counted on each rank, the norm would be sqrt(2) of it."""
    one = small("okddip-network")
    norm, gradients = checks.clipped(one, {})
    for theirs, clipped in two.run(checks.clipped, one, SHARED):
        assert theirs == pytest.approx(norm, rel=1e-9)
        torch.testing.assert_close(clipped, gradients, rtol=1e-6, atol=0)


@pytest.mark.proof
@pytest.mark.parametrize(("name", "students"), [("okddip-network", 5), ("dml", 4), ("ffsd", 4)])
def test_four_processes_train_what_one_does(four: Pool, name: str, students: int) -> None:
    assert_same_steps(four, small(name, students=students), 2, frozen=False, **SHARED)


@pytest.mark.proof
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.5}])
@pytest.mark.parametrize("name", ["okddip-network", "ffsd"])
def test_students_and_batch_are_shared_by_two_times_two(
    four: Pool, name: str, options: dict[str, Any]
) -> None:
    """Two students on four processes: with norms that don't look at the batch, one's numbers."""
    students = 3 if name == "ffsd" else 2
    assert_same_steps(four, small(name, students=students), 2, frozen=True, **options, **SHARED)


@pytest.mark.proof
def test_metrics_are_those_of_all_students(two: Pool) -> None:
    one = small("okddip-network", batch_size=250, students=2)
    expected = checks.metrics(one, {})
    for found in two.run(checks.metrics, one, SHARED):
        for name in ("student_top1", "ensemble_top1", "leader_top5"):
            assert found[name] == expected[name]


@pytest.mark.proof
def test_a_run_goes_on_in_another_arrangement(two: Pool, tmp_path: Path) -> None:
    """Students shared, then one process: the checkpoint doesn't tell them apart."""
    settings: dict[str, Any] = {
        "views": "student",
        "mixup": 0.4,
        "schedule": "cosine",
        "schedule_by": "step",
    }
    settings |= {"frozen_stages": 1, "frozen_epochs": 1}
    one = small("okddip-network", batch_size=100, epochs=2, students=2, ema=0.9, **settings)
    first, _ = two.run(checks.run, one, tmp_path / "run", {**SHARED, "max_steps": 3})
    assert first["facts"]["ranks"] == [1, 2]
    momenta = [k for k in first["tensors"] if k.startswith("optim.cohort.students.1.")]
    assert momenta
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: in float32 another number of them is soon seen
    try:
        last = checks.run(one, tmp_path / "run", {"resume": True, "max_steps": 4})
        expected = checks.run(one, tmp_path / "alone", {"max_steps": 4})
    finally:
        torch.set_num_threads(threads)
    for name, value in expected["tensors"].items():
        if name.startswith(("cohort.", "method.", "optim.", "ema.")):
            torch.testing.assert_close(last["tensors"][name], value, rtol=1e-3, atol=1e-4)
    again, _ = two.run(checks.run, one, tmp_path / "run", {**SHARED, "resume": True})
    assert again["metrics"][-1]["step"] == 10


def test_refusals(two: Pool) -> None:
    for one, options, said in (
        (small("one"), SHARED, "the branches of one share a trunk"),
        (small("cl_ilr"), SHARED, "the branches of cl_ilr share a trunk"),
        (small("okddip-branch"), SHARED, "or a network form"),
        (small("baseline", students=1), SHARED, "this recipe trains one network"),
        (small("dml"), {**SHARED, "precision": "fp16"}, "use --precision bf16"),
    ):
        assert all(said in text for text in two.run(checks.refusal, one, options))


def test_how_ranks_are_laid_out() -> None:
    assert [student_columns(world, 4) for world in (2, 4, 8, 6)] == [2, 4, 4, 3]
    with pytest.raises(UserError, match="5 ranks can't share 4 student"):
        student_columns(5, 4)
    shares = [Ranks(students=Line(r, 3)).share(5) for r in range(3)]
    assert [list(share) for share in shares] == [[0, 1], [2, 3], [4]]


def test_every_rank_has_random_numbers_of_its_own() -> None:
    """Rank 0's are those of a process alone; of the others no two have the same."""
    drawn = []
    for rank in range(4):
        torch.manual_seed(0)
        Ranks(rank=rank, size=4).seed_global(seed=3, step=5)
        drawn.append(torch.rand(4))
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.rand(4))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4
