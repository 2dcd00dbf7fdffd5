"""The newer methods on two processes that share each batch."""

from __future__ import annotations

import pytest
import torch

from fastokd.recipe.names import Recipe
from tests.distributed import checks
from tests.distributed.checks import small
from tests.distributed.pool import Pool
from tests.distributed.test_data_parallel import EXACT, assert_same_steps

pytestmark = pytest.mark.usefixtures("all_digits")


@pytest.mark.parametrize("name", ["pcl", "okdph"])
def test_companions_with_synchronised_norms_see_the_batch(two: Pool, name: str) -> None:
    one = small(name, students=2)
    assert_same_steps(two, one, 2, frozen=False, steps=checks.looped, sync_bn=True)


def test_dkd_is_a_sum_over_samples(two: Pool) -> None:
    assert_same_steps(two, small("dml", students=2, divergence="dkd"), 2, frozen=True)


@pytest.mark.parametrize(
    "one",
    [small("mcl", students=2), small("dml", students=2, divergence="dist")],
    ids=["mcl", "dist"],
)
def test_what_couples_a_batch_is_over_each_ranks_part(two: Pool, one: Recipe) -> None:
    """As over the parts of an accumulated batch, and not over the batch."""
    expected = checks.steps(one, 2, True, {"accumulate": 2})
    whole = checks.steps(one, 2, True, {})
    assert abs(whole["loss"] - expected["loss"]) > 1e-3
    for state in two.run(checks.steps, one, 2, True, {}):
        torch.testing.assert_close(state, {k: expected[k] for k in state}, **EXACT)
