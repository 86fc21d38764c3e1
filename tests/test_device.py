"""--device: which one a name stands for, and why one cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cli import fails_with

from nowag_ext import environment, ops
from nowag_ext.environment import named_device


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
