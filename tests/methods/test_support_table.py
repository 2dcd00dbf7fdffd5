"""docs/methods.md says of each method what it supports, as attempts find it."""

from __future__ import annotations

from docs.make_support_table import PAGE, page


def test_the_table_is_what_the_code_does() -> None:
    """`python docs/make_support_table.py` writes it."""
    assert page(PAGE.read_text()) == PAGE.read_text()
