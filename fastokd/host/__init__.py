"""The process's environment: CPUs, caches, the user, standard streams, file names."""
