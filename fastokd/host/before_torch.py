"""Sets the environment variables that torch and other libraries read when they are imported."""

import signal
import sys
from pathlib import Path

from fastokd.host import caches, cpus, user

# While the program is being imported, ^C ends it without a traceback. cli.main() undoes this.
_started = sys.argv[0] if sys.argv else ""
_is_the_program = Path(_started).name == "fastokd" or (
    _started == "-m" and "fastokd" in sys.orig_argv
)
if _is_the_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
user.make_known()
cpus.settle()
caches.settle()
