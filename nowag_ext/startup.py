"""Ctrl-C while the command is still importing, which takes seconds: no traceback of an import.

The package is imported before its ``__main__`` or the script's function has a say, so it looks for
itself whether it is the program. Raising KeyboardInterrupt would not do: imports swallow it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

_STATUS = 130


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


def end_quietly() -> None:
    """Until ``raise_again`` Ctrl-C ends the process with a word, if that is this package's own."""
    if (
        _is_the_program()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt, as it does in any other program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
