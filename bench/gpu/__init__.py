"""The sections of ``bench/gpu_first.py``, each run in a process of its own."""
