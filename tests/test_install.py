"""The installed package as a program, and what the sources alone say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fresh_process import fresh_python

import nowag_ext

PACKAGE = Path(nowag_ext.__file__).parent


def test_package_is_the_command() -> None:
    result = subprocess.run(
        **fresh_python("-m", "nowag_ext", "--version"), capture_output=True, check=True
    )
    assert result.stdout == f"nowag-ext {nowag_ext.__version__}\n"


def test_sources_without_kernels_say_what_to_do(tmp_path: Path) -> None:
    sources = tmp_path / "nowag_ext"
    shutil.copytree(PACKAGE, sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    result = subprocess.run(
        **fresh_python("-c", "import nowag_ext.ops", PYTHONPATH=path), capture_output=True
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: there are no compiled kernels in {sources}: ")
    assert "`pip install -e .`" in last
