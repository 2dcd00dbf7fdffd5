"""Recipes: the frozen dataclass, its names, and the recipe of each cell of the papers' tables."""
