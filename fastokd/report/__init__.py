"""Reports of runs: pages, plots, and the papers' tables."""
