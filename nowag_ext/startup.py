"""What the command does before torch is imported: how it is interrupted, how its threads wait.

The package is imported before its ``__main__`` or the script's function has a say, so it looks for
itself whether it is the program. As a library it leaves the process alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

_STATUS = 130

# Rounds that threads of libgomp, which torch comes with, spin for work before they sleep. Its own
# choice, milliseconds, holds cores that others want: beside two busy processes on two cores
# SmolLM2's shape generates 5.2 tokens/s of 20.0, with this 9.5 of 19.8. None at all costs an idle
# machine 17 %.
_SPINS = "4000"


def _is_the_program() -> bool:
    """Whether this process is ``nowag-ext`` or ``python -m nowag_ext``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # for as long as the module is looked for
        module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
        return module in ("nowag_ext", "-mnowag_ext")
    return os.path.basename(program) == "nowag-ext"


def _end(_number: int, _frame: Any) -> NoReturn:
    os.write(2, b"Interrupted.\n")
    os._exit(_STATUS)


def begin() -> None:
    """To be called before torch is imported."""
    if _is_the_program():
        _spin_briefly()
        _end_quietly()


def _spin_briefly() -> None:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _end_quietly() -> None:
    """Until ``raise_again`` Ctrl-C ends the process with a word, not an import's traceback.

    Raising KeyboardInterrupt would not do: imports swallow it, and take seconds.
    """
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt, as it does in any other program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
