"""What docs/families.md says of other libraries' classifiers."""

from __future__ import annotations

import pytest

from tests.models.families import COLUMNS, EQUAL, FAMILIES, documented, outcomes


def test_every_family_is_documented() -> None:
    table = documented()
    assert table.keys() == FAMILIES.keys()
    assert len(table) >= 50
    assert all(cells["loop"] == EQUAL for cells in table.values())


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_gives_the_networks_own_numbers_or_refuses(name: str) -> None:
    pytest.importorskip("timm")
    assert outcomes(name) == documented()[name]
    assert list(documented()[name]) == list(COLUMNS)
