"""Models whose decoder layers stay on disk: the same results, one layer in memory at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from tiny_models import ARCHITECTURES, logits, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import nowag_ext
from nowag_ext import compress, compress_model
from nowag_ext.checkpoint import load_dense_model, save_compressed, save_dense
from nowag_ext.decoder import decoder_linears
from nowag_ext.offload import (
    bias_of,
    copied,
    layers_on_disk,
    share_tensors,
    twin,
    weight_of,
)

SETTINGS: dict[str, Any] = {"d": 4, "bits": 1, "iters": 5}


def on_disk(directory: Path, architecture: str = "llama", dtype: str = "auto") -> Any:
    """A tiny model saved in several files, and loaded with its decoder layers left there."""
    source = directory / "dense"
    tiny_model(architecture).save_pretrained(source, max_shard_size="50KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    model, _ = load_dense_model(source, dtype, offload_folder=directory / "converted")
    return model


def held(model: nn.Module) -> set[str]:
    """Parameters in memory."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def assert_same_state(one: Any, two: Any) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert_same_bits(tensor, second[name], name)


def test_a_parameter_beside_the_layers_keeps_them_in_memory() -> None:
    model = tiny_model()
    assert layers_on_disk(model)["model.layers"] == "disk"
    model.model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    assert layers_on_disk(model) == {"": "cpu"}


def tied(
    directory: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]
) -> tuple[Any, dict[str, Any]]:
    """A tiny model that ties these parameters too, saved; how to have its layers left on disk."""
    every = {"lm_head.weight": "model.embed_tokens.weight", **keys}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", every)
    model = tiny_model()
    for alias, source in keys.items():
        assert model.get_parameter(alias) is model.get_parameter(source)
    model.save_pretrained(directory / "dense")
    where = {"device_map": {**layers_on_disk(tiny_model("qwen3")), "model.rotary_emb": "cpu"}}
    return model, {**where, "offload_folder": directory / "converted"}


@pytest.mark.parametrize(
    "keys",
    [
        {"model.layers.0.input_layernorm.weight": "model.norm.weight"},
        {"model.norm.weight": "model.layers.0.input_layernorm.weight"},
        {"model.layers.1.input_layernorm.weight": "model.layers.0.input_layernorm.weight"},
    ],
    ids=["of memory in a layer", "of a layer in memory", "of a layer in another"],
)
def test_layers_that_share_a_parameter_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]
) -> None:
    dense, _ = tied(tmp_path, monkeypatch, keys)
    model, _ = load_dense_model(tmp_path / "dense", offload_folder=tmp_path / "converted")
    assert held(model) == {name for name, _ in model.named_parameters()}
    assert_same_bits(logits(model), logits(dense))
    for one in (model, dense):
        compress(one, tiny_tokens(8, 16), **SETTINGS)
    save_compressed(model, None, tmp_path / "out")
    assert_same_state(nowag_ext.load(tmp_path / "out"), dense)


def test_weights_shared_on_disk_are_refused_though_they_have_been_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate forgets that they are one when it puts them back."""
    one, other = (f"model.layers.{index}.mlp.up_proj" for index in range(2))
    _, where = tied(tmp_path, monkeypatch, {f"{other}.weight": f"{one}.weight"})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", **where)
    assert model.get_parameter(f"{one}.weight").is_meta
    logits(model)
    sentence = f"{re.escape(one)} shares its weight with {re.escape(other)}.weight: ignore"
    with pytest.raises(ValueError, match=sentence):
        compress(model, tiny_tokens(8, 16), **SETTINGS)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_parameter_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    dense = tiny_model()
    dense.get_parameter(name).data.view(-1)[3] = value
    dense.save_pretrained(tmp_path / "dense")
    model, _ = load_dense_model(tmp_path / "dense", offload_folder=tmp_path / "converted")
    before = held(model)
    subject = name if "up_proj" not in name else "model.layers.0.mlp.up_proj: W"
    with pytest.raises(ValueError, match=f"^{re.escape(subject)} must be finite, but it holds a"):
        compress(model, tiny_tokens(8, 16), ignore=("v_proj",), **SETTINGS)
    assert held(model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_left_on_disk_and_read(architecture: str, tmp_path: Path) -> None:
    model, dense = on_disk(tmp_path, architecture), tiny_model(architecture)
    before = held(model)
    assert not any("layers" in name for name in before)
    assert any("embed_tokens" in name for name in before)
    for name, linear in decoder_linears(dense).items():
        assert_same_bits(weight_of(model.get_submodule(name)), linear.weight, name)
        bias = bias_of(model.get_submodule(name))
        assert (bias is None) == (linear.bias is None)
        if bias is not None:
            assert_same_bits(bias, linear.bias, name)
    assert_same_bits(logits(model), logits(dense))
    layer = copied(model.model.layers[1])
    assert not any("forward" in vars(part) or hasattr(part, "_hf_hook") for part in layer.modules())
    assert_same_state(layer, dense.model.layers[1])
    assert held(model) == before
    assert not any(file.is_file() for file in tmp_path.glob("converted/*"))


def test_is_compressed_to_the_same_bits(tmp_path: Path) -> None:
    disk, memory = on_disk(tmp_path), tiny_model()
    tokens = tiny_tokens(8, 16)
    ignored = ("lm_head", "v_proj")
    compress(memory, tokens, ignore=ignored, **SETTINGS)
    compress(disk, tokens, ignore=ignored, work_dir=tmp_path / "work", **SETTINGS)
    assert "model.layers.0.self_attn.v_proj.weight" not in held(disk)
    assert "model.layers.0.input_layernorm.weight" not in held(disk)
    save_compressed(disk, None, tmp_path / "out")
    save_compressed(memory, None, tmp_path / "wanted")
    assert_same_state(nowag_ext.load(tmp_path / "out"), nowag_ext.load(tmp_path / "wanted"))
    assert_same_bits(logits(disk), logits(memory))


def test_by_the_published_method_too(tmp_path: Path) -> None:
    disk, memory = on_disk(tmp_path), tiny_model()
    norms = random_act_norms(memory)
    for model in (disk, memory):
        compress_model(model, norms, "prune", pattern="2:4")
    save_compressed(disk, None, tmp_path / "out")
    assert_same_state(nowag_ext.load(tmp_path / "out"), memory)
    save_dense(disk, None, tmp_path / "dense again")
    again, _ = load_dense_model(tmp_path / "dense again")
    assert_same_bits(logits(again), logits(memory.dequantize()))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # tied to the head, and not
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_twin_stays_dense(architecture: str, place: str, tmp_path: Path) -> None:
    model = on_disk(tmp_path, architecture) if place == "disk" else tiny_model(architecture)
    other = twin(model)
    before = held(other)
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert theirs[name] is parameter
    given = {"head": {"d": 2, "bits": 2}, **SETTINGS}
    for one in (model, other):
        compress(one, tiny_tokens(8, 16), **given)
        if one is model:
            assert held(other) == before
            assert_same_bits(logits(other), logits(tiny_model(architecture)))
    assert_same_bits(logits(other), logits(model))


def test_what_is_equal_in_two_models_is_shared() -> None:
    model, other = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.model.layers[0].mlp.up_proj.weight.data = torch.zeros(3, 2, dtype=torch.bfloat16)
    other.model.layers[1].mlp.up_proj.float()
    before = logits(model)
    share_tensors(model, other)
    theirs = dict(other.named_parameters(remove_duplicate=False))
    own = {n for n, one in model.named_parameters(remove_duplicate=False) if one is not theirs[n]}
    assert own == {
        "model.norm.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }  # fmt: skip
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_bits(logits(model), before)


def test_another_dtype(tmp_path: Path) -> None:
    model = on_disk(tmp_path, dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == weight_of(linear).dtype == torch.bfloat16
    compress(model, tiny_tokens(8, 16), **SETTINGS)
    save_compressed(model, None, tmp_path / "out")
    assert nowag_ext.load(tmp_path / "out").dtype == torch.bfloat16


def test_pickles_are_not_read(tmp_path: Path) -> None:
    dense = tiny_model()
    dense.config.save_pretrained(tmp_path / "dense")
    torch.save(dense.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors files but pickles"):
        load_dense_model(tmp_path / "dense", offload_folder=tmp_path / "converted")


def test_what_is_interrupted_is_as_it_was(tmp_path: Path) -> None:
    model = on_disk(tmp_path)
    before = held(model)

    def interrupt(name: str, done: float, total: float) -> None:
        if name.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, tiny_tokens(8, 16), progress=interrupt, **SETTINGS)
    assert held(model) == before
    assert_same_bits(logits(model), logits(tiny_model()))


def test_hidden_states_on_disk(tmp_path: Path) -> None:
    def states() -> list[Path]:
        return list((tmp_path / "states").iterdir())

    (tmp_path / "states").mkdir()
    memory, disk = tiny_model(), tiny_model()
    tokens: Tensor = tiny_tokens(8, 16)
    compress(memory, tokens, **SETTINGS)
    compress(disk, tokens, offload_dir=tmp_path / "states", **SETTINGS)
    assert_same_state(disk, memory)
    assert states() == []
