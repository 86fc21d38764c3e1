"""Prebuilt modules are used where they are of these sources and run; others are not."""

from __future__ import annotations

import tarfile
from pathlib import Path

import gpu_modules
import pytest


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without modules, and sources; every module loads, and building makes new ones."""
    for folder in ("csrc/cuda", "cmake", "nowag_ext", "given"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text("project")
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("kernel")
    monkeypatch.setattr(gpu_modules, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_modules, "PACKAGE", tmp_path / "nowag_ext")
    monkeypatch.setattr(gpu_modules, "BUILD", tmp_path / "build" / "gpu")
    monkeypatch.setattr(gpu_modules, "load", lambda: True)
    monkeypatch.setattr(gpu_modules.shutil, "which", lambda _: None)  # no strip: these are no ELF
    monkeypatch.setattr(gpu_modules, "digest", lambda: "these")
    monkeypatch.setenv("NOWAG_PREBUILT", str(tmp_path / "given"))

    def build() -> bool:
        put(tmp_path / "nowag_ext", "built")
        gpu_modules.set_stamp("these")
        return True

    monkeypatch.setattr(gpu_modules, "build", build)
    return tmp_path


def put(folder: Path, content: str, built_from: str = "") -> None:
    for name in gpu_modules.NAMES:
        (folder / name).write_text(content)
    if built_from:
        (folder / gpu_modules.STAMP).write_text(built_from)


def used(tree: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, set[str]]:
    """What stands in the package at the end, and what the archive holds."""
    archive = tree / "modules.tar.gz"
    monkeypatch.setattr(gpu_modules.sys, "argv", ["gpu_modules.py", str(archive)])
    assert gpu_modules.main() == 0
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    return (tree / "nowag_ext" / gpu_modules.NAMES[1]).read_text(), names


def test_modules_of_these_sources_are_taken(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tree / "given", "given", "these\n")
    assert used(tree, monkeypatch) == ("given", {*gpu_modules.NAMES, gpu_modules.STAMP})
    # The archive that it wrote does as well as the folder.
    (tree / "nowag_ext" / gpu_modules.NAMES[1]).unlink()
    monkeypatch.setenv("NOWAG_PREBUILT", str(tree / "modules.tar.gz"))
    assert used(tree, monkeypatch)[0] == "given"


def test_modules_of_other_sources_are_built_anew(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tree / "given", "given", "others")
    assert used(tree, monkeypatch)[0] == "built"


def test_modules_of_unknown_sources_are_taken_if_they_run(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tree / "nowag_ext", "carried")
    assert used(tree, monkeypatch) == ("carried", set(gpu_modules.NAMES))
    monkeypatch.setattr(gpu_modules, "load", lambda: False)
    assert used(tree, monkeypatch)[0] == "built"


def test_what_an_earlier_run_built_is_taken_until_sources_change(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert used(tree, monkeypatch)[0] == "built"
    put(tree / "nowag_ext", "built before")
    assert used(tree, monkeypatch)[0] == "built before"
    monkeypatch.setattr(gpu_modules, "digest", lambda: "newer")
    assert used(tree, monkeypatch)[0] == "built"


def test_the_digest_is_of_all_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project")
    seen = {gpu_modules.digest(tmp_path)}
    for path in ("csrc/a.cu", "csrc/b.cu", "CMakeLists.txt"):
        (tmp_path / path).write_text("changed")
        seen.add(gpu_modules.digest(tmp_path))
    assert len(seen) == 4
