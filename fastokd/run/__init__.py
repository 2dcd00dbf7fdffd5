"""A run: a learner with data and a position, its folder, and what watches it."""
