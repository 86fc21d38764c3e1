"""Where the decoder layers of a Hugging Face model are, and which weights they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

_MORE_POSITIONS = 2  # OPT's


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's layers by their full names: the entries of its outermost ``nn.ModuleList``s.

    Lists of embeddings are no layers. Empty if the model has no such list.
    """
    decoder = _decoder(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and _contains(decoder, module):
            lists[name] = module
    return {
        f"{name}.{index}": layer
        for name, entries in lists.items()
        for index, layer in enumerate(entries)
        if not isinstance(layer, nn.Embedding)
    }


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` of the decoder layers by its full name, in the model's order."""
    return {
        f"{layer_name}.{name}" if name else layer_name: module
        for layer_name, layer in decoder_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """The full name of one of the model's modules, None if it is none of them."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def vocabulary_size(model: Any) -> int:
    """Tokens that the model knows: rows of its embedding, dense or packed."""
    embeddings = model.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    return int(embeddings.weight.shape[0] if known is None else known)


def check_tokens(model: Any, ids: Tensor, new_tokens: int = 0) -> None:
    """Raises ValueError for token ids [windows, length] that a causal LM cannot be run on.

    Or that it cannot follow by so many new ones. On a GPU an index out of range ends the use of the
    device, not of the call alone.
    """
    if ids.numel() == 0:
        raise ValueError(f"there must be at least one token, but ids has shape {tuple(ids.shape)}.")
    vocabulary = vocabulary_size(model)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"token ids must be in [0, {vocabulary}), but there is {low if low < 0 else high}: "
            "were they made by another model's tokenizer?"
        )
    positions = _learned_positions(model)
    # Of the last new token the model does not read the next.
    length = ids.shape[1] + max(0, new_tokens - 1)
    if positions is not None and length > positions:
        what = f"a prompt of {ids.shape[1]} tokens and {new_tokens} new ones are more"
        if not new_tokens:
            what = f"windows of {length} tokens are longer"
        raise ValueError(f"{what} than the {positions} positions that the model knows.")


def _learned_positions(model: Any) -> int | None:
    """Positions that a model looks up, None if it computes them; some hold a few rows more."""
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    parts = _decoder(model).modules()
    others = [part for part in parts if isinstance(part, nn.Embedding) and part is not words]
    if not isinstance(most, int):
        return None
    some = range(most, most + _MORE_POSITIONS + 1)
    return most if any(other.num_embeddings in some for other in others) else None


def decoder_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of two or more dimensions in the decoder layers, by its full name."""
    for layer_name, layer in decoder_layers(model).items():
        for name, parameter in layer.named_parameters():
            if parameter.dim() >= 2:
                yield f"{layer_name}.{name}", parameter


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns names a module.

    A pattern is a full name (``model.layers.0.mlp.up_proj``), the last parts of one (``up_proj``,
    ``mlp.up_proj``), or ``re:`` and a regular expression searched for in the name.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def check_patterns(model: nn.Module, patterns: Sequence[str], what: str) -> None:
    """Raises ValueError for a pattern that is no regular expression or names no linear layer.

    ``what`` the patterns are for begins the sentence.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        try:
            used = any(_matches(name, pattern) for name in linears)
        except re.error as error:
            raise ValueError(
                f"{what} pattern {pattern!r} is not a regular expression: {error}."
            ) from None
        if not used and pattern != "lm_head":
            raise ValueError(f"{what} pattern {pattern!r} names no linear layer of the model.")
