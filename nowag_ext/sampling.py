"""Calibration text that a model writes itself, for those who have too little of any other."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from nowag_ext.decoder import check_tokens
from nowag_ext.decoding import decodes_under_graph
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.pipeline.capture import evaluating
from nowag_ext.report import Progress
from nowag_ext.resume import LayerStore, open_store, state_key

# Windows that are written at once: each token reads all of the weights, for however many it is.
AT_ONCE = 16


@ordinary_tensors
def self_text(
    model: Any,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    work_dir: str | os.PathLike[str] | LayerStore | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Text that a causal LM writes: each token drawn from all that the model thinks may come.

    Windows begin as texts do for the model, after its first token, which is not part of them; a
    text that ends is followed by another. (LLM-QAT, Liu et al., 2023, has the idea.) To compress on
    it alone is far worse than on text like what the model will read; beside little of that it
    helps.

    Args:
        model: a Hugging Face causal LM, in memory.
        windows, length: how much, length in tokens.
        seed: of what is drawn.
        work_dir: a directory for what is finished; the same call, interrupted, goes on from there.
            None: nothing is kept.
        progress: called with ("writing text", tokens of a window so far, of all windows' tokens).

    Returns:
        Token ids, int64 [windows, length], on the CPU.

    Raises:
        ValueError: a number out of range, more tokens than the model has positions for, or logits
            that are not finite.
    """
    for name, value, least in (("windows", windows, 1), ("length", length, 1), ("seed", seed, 0)):
        if type(value) is not int or not least <= value < 2**62:
            raise ValueError(f"{name} must be an integer from {least} to 2^62 - 1, not {value!r}.")
    begin = torch.full((1, 1), _first_token(model), dtype=torch.int64)
    check_tokens(model, begin, length)
    on_disk = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_disk:
        raise ValueError(f"to write text the model must be in memory, but {on_disk[0]} is not.")
    with open_store(work_dir) as store, evaluating(model):
        key = ""
        if store is not None:
            key = state_key(model.state_dict().values(), [windows, length, seed])
        kept = None if store is None else store.get_text(key)
        parts = [] if kept is None else [kept]
        for first in range(sum(map(len, parts)), windows, AT_ONCE):
            count = min(AT_ONCE, windows - first)
            generator = torch.Generator(model.device).manual_seed((seed * windows + first) % 2**63)
            parts.append(
                _written(model, begin.repeat(count, 1), length, generator, windows, first, progress)
            )
            if store is not None:
                store.put_text(key, torch.cat(parts))
    return torch.cat(parts)


def windows_to_write(samples: int, length: int, later: int, texts: int) -> int:
    """Of so many windows, and ``later`` tokens, the share of one of so many texts, in windows."""
    return -(-samples // texts) + -(-later // (texts * length))


def _first_token(model: Any) -> int:
    """What a text begins with: a token for that, or else the one that ends the text before."""
    for config in (model.generation_config, model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int) and token >= 0:
                return token
    return 0


@torch.inference_mode()
def _written(
    model: Any,
    ids: Tensor,
    length: int,
    generator: torch.Generator,
    windows: int,
    before: int,
    progress: Progress | None,
) -> Tensor:
    """Windows that are written together, int64 [windows, length]."""
    tokens = torch.empty(len(ids), length, dtype=torch.int64)
    ids = ids.to(model.device)
    # One that does not grow is copied less; not all models take it.
    past = StaticCache(model.config, length) if decodes_under_graph(model, length) else None
    for place in range(length):
        if progress is not None:
            done = before * length + place * len(ids)
            progress("writing text", done, windows * length)
        output = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1)
        if not torch.isfinite(chances).all():
            raise ValueError(
                f"the model's logits are not finite after {place} tokens of its own: it is "
                "damaged, or overflows in its dtype."
            )
        ids = torch.multinomial(chances, 1, generator=generator)
        tokens[:, place] = ids[:, 0].cpu()
    return tokens
