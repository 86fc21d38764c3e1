"""Generation with a causal LM, and how fast it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nowag_ext.decoder import check_tokens
from nowag_ext.decoding import decode_graph, decodes_under_graph

# The cache that a graph needs; transformers would compile the model for it, which takes a minute.
_UNDER_GRAPH = {"cache_implementation": "static", "disable_compile": True}


@dataclass(frozen=True)
class Generation:
    """What a model wrote, and how long it took.

    Attributes:
        text: the new text, without the prompt.
        tokens: number of new tokens.
        seconds: wall-clock seconds, reading the prompt included.
    """

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all of the seconds."""
        return self.tokens / self.seconds


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """The prompt's tokens, int64 [1, n]; ``chat`` puts it into the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, or a tokenizer without a chat template where ``chat`` is set.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template: leave --chat out.")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: it must hold at least one token.")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Tensor,
    *,
    max_new_tokens: int = 64,
    fixed_length: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], object] | None = None,
) -> Generation:
    """Text of at most ``max_new_tokens`` tokens, where it can be under a graph (``decode_graph``).

    Args:
        model: a Hugging Face causal LM.
        tokenizer: turns the new tokens into text.
        prompt: int64 [1, n] from ``encode_prompt``.
        max_new_tokens: at least 1.
        fixed_length: go on past the end-of-text token, so that speeds compare.
        temperature: tokens are drawn at it, from all of the vocabulary; at 0 each is the most
            likely one.
        seed: of what is drawn.
        show: called with each piece of the text as it comes.

    Raises:
        ValueError: a number out of range, or more tokens than the model has positions for.
    """
    check_generation(max_new_tokens, temperature)
    check_tokens(model, prompt, max_new_tokens)
    if temperature > 0:
        torch.manual_seed(seed)
    ids = prompt.to(next(model.parameters()).device)
    graph = decodes_under_graph(model, ids.shape[1] + max_new_tokens)
    start = time.perf_counter()
    with decode_graph(model) if graph else nullcontext():
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens if fixed_length else None,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=None,
            top_k=0 if temperature > 0 else None,
            pad_token_id=_pad_token(model, tokenizer),
            streamer=None if show is None else _streamer(tokenizer, show),
            **(_UNDER_GRAPH if graph else {}),
        )
    new = output[0, ids.shape[1] :].tolist()
    seconds = time.perf_counter() - start
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def _streamer(tokenizer: Any, show: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def check_generation(max_new_tokens: int, temperature: float) -> None:
    """Raises ValueError for numbers that ``generate`` refuses."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a positive number, not {temperature}.")


def tokens_per_second(
    model: nn.Module, tokenizer: Any, prompt: Tensor, *, new_tokens: int = 64, warmup: int = 4
) -> float:
    """Greedy tokens a second over exactly ``new_tokens`` tokens, after a warm-up."""
    generate(model, tokenizer, prompt, max_new_tokens=warmup, fixed_length=True)
    run = generate(model, tokenizer, prompt, max_new_tokens=new_tokens, fixed_length=True)
    return run.tokens_per_second


def _pad_token(model: nn.Module, tokenizer: Any) -> int:
    """Generation of one sequence never pads, but transformers warns unless told a token."""
    for source in (getattr(model, "generation_config", None), tokenizer):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return int(value)
    return 0
