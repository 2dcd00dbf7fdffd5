"""What to train: the frozen recipe, its names, and a name for each cell of the papers."""
