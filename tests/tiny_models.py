"""Tiny, randomly initialised Hugging Face models that the tests of whole models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 200
LAYERS = 2
LINEARS = 7 * LAYERS

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that models differ in their logits
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(architecture: str = "llama") -> PreTrainedConfig:
    if architecture == "llama":
        return LlamaConfig(**_SIZES, attention_bias=True, tie_word_embeddings=True)
    if architecture == "mistral":
        return MistralConfig(**_SIZES, sliding_window=None)
    if architecture == "qwen2":
        return Qwen2Config(**_SIZES)
    return Qwen3Config(**_SIZES)


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A random model in eval mode; its biases and norms are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_tokens(batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def random_act_norms(model: Any, seed: int = 2) -> dict[str, Tensor]:
    """Positive act_norms for every linear of the decoder layers, without a forward pass."""
    from nowag_ext.decoder import decoder_linears

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(linear.in_features, generator=generator) + 0.1
        for name, linear in decoder_linears(model).items()
    }


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tiny_tokens() if tokens is None else tokens).logits
