"""``fastokd reproduce``: the papers' tables, one of them or all within a budget of time."""
