"""The commands, grouped by what they work on; `cli.py` registers them."""
