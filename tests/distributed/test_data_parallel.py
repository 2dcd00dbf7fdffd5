"""Two processes share each batch: the numbers of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.recipe.names import Recipe
from tests.distributed import checks
from tests.distributed.checks import averaged, modern, small
from tests.distributed.pool import Pool

# A process that a test starts has all of them.
pytestmark = pytest.mark.usefixtures("all_digits")

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def assert_same_steps(
    pool: Pool, one: Any, count: int, frozen: bool, steps: Any = checks.steps, **options: Any
) -> None:
    """Weights, running statistics, momenta and losses, on every rank."""
    plain = checks.looped if steps is checks.looped else checks.steps
    alone = {k: v for k, v in options.items() if k not in ("sync_bn", "parallel")}
    expected = plain(one, count, frozen, alone)
    states = pool.run(steps, one, count, frozen, options)
    assert states[0].keys() == expected.keys()  # rank 0 saves all of it, whoever trained it
    for state in states:
        assert state.keys() <= expected.keys()
        torch.testing.assert_close(state, {k: expected[k] for k in state}, **EXACT)


# Shared trunk, draws, a gate, sources computed from a batch, maps and a method's own networks.
@pytest.mark.parametrize("name", ["okddip-branch", "okddip_random-branch", "one", "kdcl", "ffsd"])
def test_gradients_are_those_of_one_process(two: Pool, name: str) -> None:
    assert_same_steps(two, small(name), 2, frozen=True)


def test_parts_of_a_batch_are_sent_once_and_clipped_as_a_whole(two: Pool) -> None:
    assert_same_steps(two, small("okddip-branch"), 2, frozen=True, accumulate=2, clip_norm=0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_that_are_cast_together(two: Pool, accumulate: int) -> None:
    """DDP gets a student's gradients together; in parts it looks for unused parameters, too."""
    assert_same_steps(
        two,
        small("okddip-branch"),
        2,
        frozen=True,
        steps=checks.shadowed_steps,
        accumulate=accumulate,
    )


MODERN = [
    (
        modern("okddip-branch", optimizer="lamb", trunk_views="all", balanced=True),
        {"checkpoint_activations": True},
    ),
    (
        modern("dml", optimizer="adamw", views="shared", repeats=3, frozen_stages=-1),
        {"accumulate": 2, "clip_norm": 0.5},
    ),
]


@pytest.mark.parametrize(("one", "options"), MODERN)
def test_modern_settings_are_those_of_one_process(
    two: Pool, pictures: Path, one: Recipe, options: dict[str, Any]
) -> None:
    """Mixed images, views, samples, rates by step, frozen stages, averages: over two epochs."""
    assert_same_steps(two, one, 4, frozen=True, steps=checks.looped, data_root=pictures, **options)


def test_recomputed_statistics_are_of_the_images_of_both_ranks(two: Pool, pictures: Path) -> None:
    """Those of the first norm, before which there is none: means of equal shares."""
    one = averaged(views="shared")
    options = {"data_root": pictures}
    wanted = checks.looped(one, 2, True, options, True)["ema.bn1.running_mean"]
    for found in two.run(checks.looped, one, 2, True, options, True):
        torch.testing.assert_close(found["ema.bn1.running_mean"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_students_that_are_slices_of_one_memory(two: Pool, engine: str) -> None:
    """DDP hooks their parameters, which stay leaves."""
    assert_same_steps(two, small("okddip-branch"), 2, frozen=True, engine=engine, clip_norm=0.5)


@pytest.mark.parametrize("name", ["okddip-branch", "ffsd", "one"])
def test_synchronised_norms_see_the_batch(two: Pool, name: str) -> None:
    """In training: without it each rank would normalise over its own half."""
    assert_same_steps(two, small(name), 2, frozen=False, sync_bn=True)


def test_ffsd_reads_the_first_ranks_statistics(two: Pool) -> None:
    """Its decoders read them while it trains: they are handed out before each step."""
    first, second = two.run(checks.statistics_read, small("ffsd"))
    for step in range(2):
        torch.testing.assert_close(second[step], first[step], rtol=0, atol=0)
    assert any((first[1][name] != value).any() for name, value in first[0].items())


def test_metrics_are_exact_over_uneven_shares(two: Pool) -> None:
    """99 images: the ranks have 49 and 50."""
    one = small("okddip-branch", batch_size=250, students=2)
    expected = checks.metrics(one, {})
    for found in two.run(checks.metrics, one, {}):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "top" in name:
                assert found[name] == value, name
            elif value is not None:
                close = {"rtol": 1e-6, "atol": 1e-6}  # an attention matrix is single
                torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), **close)


def test_the_first_process_decides(two: Pool, tmp_path: Path) -> None:
    assert two.run(checks.tuned, small("dml"), tmp_path) == [("grouped", 1), ("grouped", 0)]
    (engine, first), (_, second) = two.run(checks.timed_alone, small("dml"))
    assert engine == "loop"
    trained = [k for k in first if "running" not in k]  # running statistics are each rank's own
    torch.testing.assert_close({k: first[k] for k in trained}, {k: second[k] for k in trained})


def test_every_candidate_is_timed_on_a_ranks_share(two: Pool) -> None:
    assert two.run(checks.timed_shares, small("dml", batch_size=8)) == [(4, 4), (4, 4)]


@pytest.mark.parametrize("compile", [None, True, False])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"sync_bn": True},
        {"parallel": "students"},
        {"deterministic": True},
        {"engine": "grouped"},
    ],
)
def test_what_is_asked_for_runs_on_every_rank(
    two: Pool, tmp_path: Path, asked: dict[str, Any], compile: bool | None
) -> None:
    """A run too short to measure, and those that take no engine but their own."""
    how = "compiled" if compile else "eager"
    engine = asked.get("engine", "loop")
    one = small("dml", students=2)
    found = two.run(checks.settled, one, tmp_path, {**asked, "compile": compile})
    assert found == [(f"{engine}, {how}, channels_last", not asked)] * 2


def test_every_rank_is_told_that_no_engine_can(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(checks.refused_tuning, small("dml"), tmp_path)
    assert first == second
    assert "--compile is asked for, but no engine can" in first


def test_refusals(two: Pool) -> None:
    for one, options, said in (
        (small("okddip-branch", batch_size=9), {}, "choose a multiple of 2"),
        (small("one", batch_size=2), {}, "1 on each of 2 ranks"),
        (small("dml", model="resnet18", batch_size=2), {}, "resnet18 normalises over a batch of"),
        (small("dml", model="resnet18", batch_size=2), {"sync_bn": True}, "nothing"),
        (small("dml"), {"parallel": "both"}, "choose data or students"),
        (small("dml"), {"sync_bn": True, "engine": "vmap"}, "leave one of them out"),
    ):
        assert all(said in text for text in two.run(checks.refusal, one, options))
    assert "leave --sync-bn out" in checks.refusal(small("dml"), {"sync_bn": True})
    assert "start several with torchrun" in checks.refusal(small("dml"), {"parallel": "students"})
