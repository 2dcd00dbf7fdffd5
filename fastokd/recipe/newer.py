"""The published settings of the methods after the two papers: what differs from OKDDip's."""

from __future__ import annotations

from collections.abc import Callable

from fastokd.recipe.recipe import Recipe

# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {}
