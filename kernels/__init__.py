"""Triton kernels, one file an op."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from fastokd.kernels import _interpreter  # noqa: F401
