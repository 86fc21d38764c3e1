"""--device: which one a name stands for, and why one cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fails_with

from nowag_ext import environment, ops
from nowag_ext.environment import named_device
from nowag_ext.pipeline.ranks import own_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with two, and what is run on them: nothing, here."""
    ran: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: device)
    monkeypatch.setattr(ops, "normalize", ran.append)
    monkeypatch.setattr(environment, "_has_cuda_kernels", lambda: True)
    return ran


def test_names(two_gpus: list[Any]) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    names = {"auto": first, "cuda": first, "cuda:0": first, "cuda:1": second}
    assert [named_device(name) for name in names] == list(names.values()) == two_gpus
    assert named_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CUDA", "", "cuda:0,1", "mps"])
def test_other_names_are_refused(two_gpus: list[Any], name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^device must be auto, cpu, cuda or cuda:N, not '{name}'"
    ):
        named_device(name)


def test_a_device_that_is_not_there(two_gpus: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^there is no device cuda:2: torch finds 2\.$"):
        named_device("cuda:2")


def test_a_device_that_has_no_kernels(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def normalize(_: Any) -> None:
        raise RuntimeError("normalize: CUDA says: no kernel for this device")

    monkeypatch.setattr(ops, "normalize", normalize)
    assert named_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device cuda cannot be used: .* no kernel for this"):
        named_device("cuda")


def test_without_kernels_or_devices(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_has_cuda_kernels", lambda: False)
    assert named_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="built without CUDA"):
        named_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device cuda:1 cannot be used, since torch "):
        named_device("cuda:1")


def test_the_command_refuses_before_it_reads_anything() -> None:
    for command in (
        ["generate", "nowhere", "--prompt", "x"],
        ["eval", "nowhere", "--text", "nowhere.txt"],
    ):
        fails_with(
            "device must be auto, cpu, cuda or cuda:N, not 'gpu'", *command, "--device", "gpu"
        )


def test_processes_of_a_host_take_one_each(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert own_device("cuda") == first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, place in enumerate((first, second, first)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert own_device("cuda") == own_device("auto") == place
        assert own_device("cuda:1") == second
        assert own_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("command", ["compress", "distill"])
def test_what_a_compression_on_a_device_is_refused(
    command: str, two_gpus: list[Any], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text")
    model = tmp_path / "model"
    model.mkdir()
    given = ["--dense", str(model)] if command == "distill" else []
    given = [command, str(model), *given, "-o", str(tmp_path / "out"), "--text", str(text)]
    fails_with("disk .offload_dir, --offload. for a model on the CPU, not on cuda:1",
               *given, "--device", "cuda:1", "--offload", str(tmp_path))  # fmt: skip
    fails_with("there is no device cuda:2", *given, "--device", "cuda:2")
    if command == "compress":
        fails_with("--samples auto goes by how fast the CPU is: on cuda:0 give a number",
                   *given, "--device", "cuda", "--samples", "auto")  # fmt: skip
    assert not (tmp_path / "out").exists()
