"""A random Llama that fits in a test, and a byte-level tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


def tiny_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {character: index + 1 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two decoder layers with grouped-query attention; large weights, so that logits differ.

    Every linear has at least 256 sub-vectors of 4, enough for codes of 8 bits.
    """
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """The tiny model and its tokenizer as a checkpoint."""
    tiny_llama(seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_work(directory: Path) -> Path:
    """A directory with the tiny model and a text, for the commands."""
    save_tiny(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    return directory
