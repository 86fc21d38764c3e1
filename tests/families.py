"""Tiny random models of several families, and what is known of their layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from nowag_ext.pipeline.blocks import Blocks, Group

LENGTH = 20
HIDDEN = 32

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,  # of 8, so that queries have the shape of hidden states
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**SIZES),
    "cohere": lambda: CohereConfig(**SIZES),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "gpt_neox sequential": lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.22),
}

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O_PROJ, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
_LLAMA = [QKV, O_PROJ, GATE_UP, DOWN]
_GPT_NEOX = [
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3": _LLAMA,
    "phi3": [("self_attn.qkv_proj",), O_PROJ, ("mlp.gate_up_proj",), DOWN],
    "cohere": [(*QKV, *GATE_UP), O_PROJ, DOWN],
    "olmo2": _LLAMA,
    "gpt_neox": _GPT_NEOX,
    "gpt_neox sequential": _GPT_NEOX,
    "granite": _LLAMA,
}
AFTER_ATTENTION = "post_attention_layernorm"
OUTPUT = ""  # the layer's own
_SEQUENTIAL = {"self_attn.o_proj": AFTER_ATTENTION, "mlp.down_proj": OUTPUT}
TAPS: dict[str, dict[str, str]] = {
    "llama": _SEQUENTIAL,
    "qwen3": _SEQUENTIAL,
    "gemma3": {},
    "phi3": _SEQUENTIAL,
    "cohere": {"self_attn.o_proj": OUTPUT, "mlp.down_proj": OUTPUT},
    "olmo2": {},
    "gpt_neox": {"attention.dense": OUTPUT, "mlp.dense_4h_to_h": OUTPUT},
    "gpt_neox sequential": {"attention.dense": AFTER_ATTENTION, "mlp.dense_4h_to_h": OUTPUT},
    "granite": {},
}
MLP_ENDS = {"mlp.down_proj": "mlp", "self_attn.o_proj": "self_attn"}
NEOX_ENDS = {"attention.dense": "attention", "mlp.dense_4h_to_h": "mlp"}
families = pytest.mark.parametrize("family", CONFIGS)


def make_model(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@cache
def shared_model(family: str) -> Any:
    """For tests that change nothing of it."""
    return make_model(family)


def windows(count: int = 3, seed: int = 1) -> Tensor:
    return tiny_tokens(count, LENGTH, seed=seed)


def hidden_before(blocks: Blocks, index: int, ids: Tensor) -> Tensor:
    hidden = blocks.embed(ids)
    for earlier in range(index):
        hidden = blocks.run(earlier, hidden)
    return hidden


class Recorded:
    """What one forward of a whole model has shown: what modules read, and what they returned."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.read: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            self.states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if given is not None:
                self.read[name] = given.clone()
            if isinstance(output, Tensor):
                self.returned[name] = output.clone()

        return hook


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def without_layer(layer: str, groups: list[Group]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Names in the groups and taps by linear, as they are called within the layer."""
    names = [tuple(name.removeprefix(f"{layer}.") for name in group.names) for group in groups]
    taps = {
        name.removeprefix(f"{layer}."): "" if tap == layer else tap.removeprefix(f"{layer}.")
        for group in groups
        for name, tap in zip(group.names, group.taps, strict=True)
        if tap is not None
    }
    return names, taps


def assert_untouched(model: Any) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)
