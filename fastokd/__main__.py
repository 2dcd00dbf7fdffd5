"""``python -m fastokd``, which is how torchrun starts the commands: ``torchrun ... -m fastokd``."""

from fastokd.cli import main

main()
