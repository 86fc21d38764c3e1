"""Python in a process of its own, with the packages that the tests run on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent


def fresh_python(*arguments: object, **environment: str) -> dict[str, Any]:
    """Arguments of subprocess.run or Popen: this Python, these arguments, these variables besides.

    It finds every package where this process does. Not in the project's folder: `python -c` there
    would import the sources instead of the installed package, which alone has the compiled modules.
    """
    return {
        "args": [sys.executable, *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        "cwd": _TESTS,
        "text": True,
    }
