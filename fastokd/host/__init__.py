"""What the process finds around it: CPUs, caches, the user, its standard streams, names of files."""
