"""Text that a model cannot be run on: longer than the positions it knows, or of other tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_model import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

import nowag_ext
from nowag_ext.evaluate import compare_with_dense, perplexity, teacher_forced_check
from nowag_ext.generate import generate

VOCABULARY, POSITIONS = 67, 24
VQ: dict[str, Any] = {"d": 2, "bits": 2, "iters": 3}
_HEADS: dict[str, Any] = {"vocab_size": VOCABULARY, "num_attention_heads": 4}
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": POSITIONS, **_HEADS
}  # fmt: skip
LEARNT: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=POSITIONS
    ),
}


def made(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))


def _distil(model: Any, given: Tensor) -> None:
    compressed = nowag_ext.compress(
        made(OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32)), tokens(8), **VQ
    )
    nowag_ext.distill(compressed, model, given)


USES: dict[str, Callable[[Any, Tensor], object]] = {
    "compress": lambda model, given: nowag_ext.compress(model, given, **VQ),
    "calibrate": lambda model, given: nowag_ext.calibrate(model, [given]),
    "distill": _distil,
    "perplexity": lambda model, given: perplexity(model, given.flatten(), window=given.shape[1]),
    "KL": lambda model, given: compare_with_dense(
        model, model, given.flatten(), window=given.shape[1]
    ),
    "token by token": lambda model, given: teacher_forced_check(
        model, given.flatten(), count=given.shape[1]
    ),
}


@pytest.mark.parametrize("use", USES)
def test_more_tokens_than_positions(use: str) -> None:
    sentence = rf"windows of {POSITIONS + 1} tokens are longer than the {POSITIONS} positions"
    with pytest.raises(ValueError, match=sentence):
        USES[use](made(LEARNT["opt"]()), tokens(POSITIONS + 1))


@pytest.mark.parametrize("use", USES)
def test_tokens_of_another_model(use: str) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, {VOCABULARY}\), but there is"):
        USES[use](made(LEARNT["opt"]()), tokens(8) + VOCABULARY)


@pytest.mark.parametrize("family", LEARNT)
def test_as_many_tokens_as_positions(family: str) -> None:
    perplexity(made(LEARNT[family]()), tokens(POSITIONS).flatten(), window=POSITIONS)
    with pytest.raises(ValueError, match="positions"):
        perplexity(made(LEARNT[family]()), tokens(POSITIONS).flatten(), window=POSITIONS + 1)


def test_generation_ends_with_the_positions() -> None:
    model, prompt = made(LEARNT["opt"]()), tokens(POSITIONS // 2)[:1]
    most = POSITIONS - prompt.shape[1] + 1
    run = generate(model, tiny_tokenizer(), prompt, max_new_tokens=most, fixed_length=True)
    assert run.tokens == most
    with pytest.raises(ValueError, match=f"{most + 1} new ones are more than the {POSITIONS} pos"):
        generate(model, tiny_tokenizer(), prompt, max_new_tokens=most + 1)


def test_a_prompt_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"at least one token, but ids has shape \(1, 0\)"):
        generate(made(LEARNT["opt"]()), tiny_tokenizer(), tokens(0)[:1])


def test_positions_that_are_computed_have_no_end() -> None:
    model = made(LlamaConfig(**_SIZES, intermediate_size=48))
    perplexity(model, tokens(2 * POSITIONS).flatten(), window=2 * POSITIONS)
