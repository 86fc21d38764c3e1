"""The cases of pretended_device_cases.py, in a process of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fresh_process import fresh_python

CASES = Path(__file__).with_name("pretended_device_cases.py")


@pytest.mark.slow
def test_cases() -> None:
    done = subprocess.run(
        **fresh_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", CASES),
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
