"""``python -m fastokd.ops``: builds the C++ ops, or says why they can't be built here."""

from __future__ import annotations

import sys
import time

from fastokd.ops import cpp


def main() -> int:
    start = time.perf_counter()
    reason = cpp.ensure_built()
    if reason is not None:
        print(f"impl='cpp' is not available, impl='torch' serves instead: {reason}")
        return 1
    print(f"C++ ops: {cpp.build()}, {cpp.capability()} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
