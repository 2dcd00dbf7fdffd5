"""Several processes as one run: ranks, launch, agreement."""
