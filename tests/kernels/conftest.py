"""Triton chooses between compiler and interpreter when a kernel is imported, so a process has one.

``interpreted/`` runs where TRITON_INTERPRET=1 is set, and ``test_interpreted.py`` starts such a
process: one ``pytest tests`` runs both.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
