"""docs/recipes.md has every setting with its type, default and meaning, as the code has them."""

from __future__ import annotations

from docs.make_settings_table import PAGE, page


def test_the_tables_are_the_codes() -> None:
    """`python docs/make_settings_table.py` writes them."""
    assert page(PAGE.read_text()) == PAGE.read_text()
