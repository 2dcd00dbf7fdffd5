"""The counted table of docs/performance.md."""

from __future__ import annotations

import pytest

from bench import counted_steps
from fastokd.recipe.names import recipe


def test_the_parts_are_the_whole(cpp_ops: None) -> None:
    for norms in ("auto", "torch"):
        of = recipe("okddip-branch/resnet8/cifar100", batch_size=8)
        _, whole, *parts, around, _ = counted_steps.row("ResNet-8", of, norms)
        counts = [int(count.replace(",", "")) for count in parts]
        assert int(whole) == sum(counts) + int(around)
        # The metrics at least; less than before they were part of the step.
        assert 10 < int(around) <= 75
    # Each of 12 norms of this cohort has 4 + 3 kernels and a counter.
    norms_of = dict(zip(counted_steps.PARTS, counts, strict=True))["norms"]
    assert norms_of % 8 == 0


@pytest.mark.proof
def test_the_page_is_what_the_program_makes(cpp_ops: None) -> None:
    found = counted_steps.REGION.search(counted_steps.PAGE.read_text())
    assert found is not None
    assert found[0] == f"{found[1]}{counted_steps.table('auto')}{found[2]}"
