"""What compresses and distils, on a device that there is not: nothing is left behind on the CPU.

For a process of its own (test_pretended_device.py): torch knows the device from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import offload
from compare import assert_same_bits
from pretended_device import DEVICE, Pretended, moved, pretended_device
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import save_tiny
from tiny_models import random_act_norms, tiny_model, tiny_tokens
from torch import Tensor

import nowag_ext
from nowag_ext import disk, evaluate, feedback
from nowag_ext.pipeline import compress as pipeline


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device, taken for one that has kernels."""
    for module in (feedback, pipeline, nowag_ext.vq):
        monkeypatch.setattr(module, "check_device", lambda _: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pretended_device():
        yield
    torch.set_num_threads(before)


def model_of(seed: int = 0) -> Any:
    model = tiny_model("llama", seed=seed)
    model.set_attn_implementation("eager")
    return model


def assert_same(there: Any, here: Any) -> None:
    """Every tensor of the model is on the device, and what it is on the CPU."""
    state = there.state_dict()
    for name, tensor in here.state_dict().items():
        assert isinstance(state[name], Pretended), f"{name} is on {state[name].device}"
        assert_same_bits(state[name].inner.detach(), tensor.detach(), name)


def test_operands_on_two_devices_are_refused() -> None:
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    index = torch.tensor([0, 2])
    assert (there + there).device == DEVICE
    assert (there + torch.tensor(2.0)).device == DEVICE
    assert there[index].device == DEVICE
    assert there.cpu().device == here.device
    for mix in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here[index.to(DEVICE)],
        lambda: there.index_put_((index,), here[:2]),
    ):
        with pytest.raises(RuntimeError, match="operands on pretended:0 and on cpu"):
            mix()


CALLS: dict[str, dict[str, Any]] = {
    "vq, a codebook for the model": {"d": 4, "bits": 1.5},
    "vq, one a layer": {"d": 4, "bits": 1.5, "codebook_scope": "layer"},
    "vq, one a kind, and the head": {
        "d": 4, "bits": 1.5, "codebook_scope": "kind", "head": {"d": 2, "bits": 2},
    },
    "50 %": {"method": "prune", "sparsity": 0.5},
    "2:4": {"method": "prune", "pattern": "2:4"},
    "mixed": {
        "d": 2, "bits": 2, "overrides": {"down_proj": {"method": "prune", "sparsity": 0.5}},
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", CALLS.values(), ids=CALLS.keys())
def test_compress(settings: dict[str, Any]) -> None:
    tokens = tiny_tokens(4, 24)
    here = nowag_ext.compress(model_of(), tokens, **settings)
    there = nowag_ext.compress(moved(model_of()), tokens, **settings)
    assert_same(there, here)


@pytest.mark.parametrize("method", [{"method": "vq", "d": 4, "bits": 1.5}, {"method": "prune"}])
def test_the_published_method(method: dict[str, Any]) -> None:
    here, there = model_of(), moved(model_of())
    batches = [tiny_tokens(2, 16)]
    norms = nowag_ext.calibrate(there, batches)
    for name, one in nowag_ext.calibrate(here, batches).items():
        assert_same_bits(norms[name].cpu(), one, name)
    nowag_ext.compress_model(here, random_act_norms(here), **method)
    nowag_ext.compress_model(there, random_act_norms(there), **method)
    assert_same(there, here)
    nowag_ext.to_dense(here)
    nowag_ext.to_dense(there)
    assert_same(there, here)


def test_distill() -> None:
    models = []
    for place in (lambda model: model, moved):
        model = nowag_ext.compress(place(model_of()), tiny_tokens(4, 24), d=4, bits=1.5)
        nowag_ext.distill(model, place(model_of()), tiny_tokens(4, 24, seed=5))
        models.append(model)
    assert_same(models[1], models[0])


@contextmanager
def opened_here(file: str, framework: str, device: str) -> Iterator[Any]:
    """A file of safetensors, which know no such device, as accelerate reads it."""
    with safe_open(file, framework, device="cpu") as opened:
        yield SimpleNamespace(get_tensor=lambda name: opened.get_tensor(name).to(device))


@pytest.mark.parametrize("method", [{"method": "vq", "d": 4, "bits": 1.5}, {"method": "prune"}])
def test_from_disk_to_disk(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "own_device", torch.device)
    monkeypatch.setattr(offload, "safe_open", opened_here)
    # In this thread, where the device is known.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "attn_implementation": "eager"})
    )
    # Adam's own choice of how to take a step, by the device, shows in values that it moves.
    more = tiny_tokens(3, 16, seed=5) if method["method"] == "vq" else None
    seen: list[torch.device] = []
    through = disk.compress_blocks

    def look(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(one.device for one in model.parameters())
        return through(model, *args, **kwargs)

    def stop(_name: str, done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(disk, "compress_blocks", look)
    with pytest.raises(KeyboardInterrupt):  # and gone on with, below
        nowag_ext.compress(
            tmp_path / "model", tiny_tokens(4, 16), output=tmp_path / str(DEVICE),
            device=str(DEVICE), progress=stop, **method,
        )  # fmt: skip
    for device in ("cpu", str(DEVICE)):
        nowag_ext.compress(
            tmp_path / "model", tiny_tokens(4, 16), output=tmp_path / device,
            distill_tokens=more, device=device, **method,
        )  # fmt: skip
    assert set(seen) == {torch.device("meta"), torch.device("cpu"), DEVICE}
    here = load_file(tmp_path / "cpu" / "model.safetensors")
    there = load_file(tmp_path / str(DEVICE) / "model.safetensors")
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert_same_bits(there[name], tensor, name)


def test_evaluation() -> None:
    tokens = tiny_tokens(1, 96)[0]
    here, there = (
        evaluate.perplexity(model, tokens, window=32) for model in (model_of(), moved(model_of()))
    )
    assert there.perplexity == here.perplexity


def test_one_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    w, inputs = torch.randn(40, 24, generator=generator), torch.randn(90, 24, generator=generator)
    norms, hessian = inputs.square().mean(0).sqrt(), inputs.T @ inputs / 90
    for compress, settings in (
        (nowag_ext.vq_compress, {"d": 4, "bits": 1}),
        (nowag_ext.vq_compress, {"d": 4, "bits": 1, "hessian": hessian}),
        (nowag_ext.prune, {"sparsity": 0.5}),
        (nowag_ext.prune, {"pattern": "2:4", "hessian": hessian}),
    ):
        place: dict[str, Any] = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in settings.items()
        }
        here = compress(w, norms, **settings)
        there = compress(w.to(DEVICE), norms.to(DEVICE), **place)
        for name, tensor in here.tensors().items():
            assert_same_bits(there.tensors()[name].cpu(), tensor, name)
