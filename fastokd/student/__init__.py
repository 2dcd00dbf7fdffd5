"""One trained student: its file, where it comes from and what is done with it."""
