"""Triton 3.6's interpreter on NumPy 2.4.

A kernel's scalar is an array of one element there, and a loop bound is converted to ``int``, which
NumPy 2.4 rejects. Triton 3.7 extracts the element first; this patch does so for 3.6.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

if triton.__version__.startswith("3.6."):
    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_index
