"""The installed package as a program, and what the sources alone say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fresh_process import fresh_python

import nowag_ext

PACKAGE = Path(nowag_ext.__file__).parent


def test_package_is_the_command() -> None:
    result = subprocess.run(
        **fresh_python("-m", "nowag_ext", "--version"), capture_output=True, check=True
    )
    assert result.stdout == f"nowag-ext {nowag_ext.__version__}\n"


# What `nowag-ext`, the script that pip makes, consists of.
SCRIPT = (
    "import sys\nfrom nowag_ext.cli import app\nif __name__ == '__main__':\n    sys.exit(app())\n"
)


def interrupted_import(tmp_path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Python under a command, interrupted while torch is imported, which makes light of it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('numpy could not be imported') from None\n"
        "raise ImportError('not interrupted')\n"
    )
    (tmp_path / "nowag-ext").write_text(SCRIPT)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    arguments: dict[str, Any] = fresh_python(*command, PYTHONPATH=path)
    return subprocess.run(**arguments, capture_output=True, preexec_fn=_as_in_a_terminal)


def _as_in_a_terminal() -> None:
    """A shell that starts the tests in the background has them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("command", "given", "spins"),
    [
        (["-m", "nowag_ext"], {}, "4000"),
        (["-m", "nowag_ext"], {"GOMP_SPINCOUNT": "7"}, "7"),
        (["-m", "nowag_ext"], {"OMP_WAIT_POLICY": "active"}, "None"),
        (["-c", "import nowag_ext"], {}, "None"),
    ],
)
def test_the_command_sets_how_its_threads_wait_before_torch_starts_them(
    tmp_path: Path, command: list[str], given: dict[str, str], spins: str
) -> None:
    (tmp_path / "torch.py").write_text(
        "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nraise SystemExit\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    arguments: dict[str, Any] = fresh_python(*command, PYTHONPATH=path, **given)
    for name in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - given.keys():
        arguments["env"].pop(name, None)
    assert subprocess.run(**arguments, capture_output=True).stdout == f"{spins}\n"


@pytest.mark.parametrize(
    "options", [["-m", "nowag_ext"], ["-X", "dev", "-mnowag_ext"], ["nowag-ext"]], ids=" ".join
)
def test_ctrl_c_while_the_command_is_imported(tmp_path: Path, options: list[str]) -> None:
    if options == ["nowag-ext"]:
        options = [str(tmp_path / "nowag-ext")]
    result = interrupted_import(tmp_path, *options, "compress", "-m", "nowag_ext")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize(
    "options",
    [["-c", "import nowag_ext", "-m", "nowag_ext"], ["-m", "nowag_ext.version", "nowag-ext"]],
    ids=" ".join,
)
def test_ctrl_c_while_another_program_imports_the_package(
    tmp_path: Path, options: list[str]
) -> None:
    result = interrupted_import(tmp_path, *options)
    assert result.returncode == 1
    assert result.stderr.endswith("ImportError: numpy could not be imported\n")


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
