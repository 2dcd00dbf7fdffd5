"""Measurements beside a run, kept in its folder: its students' answers, the cost of its steps."""
