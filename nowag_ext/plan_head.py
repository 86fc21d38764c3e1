"""The head of a model, and the embedding that is tied to it, if they are to be packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nowag_ext.decoder import name_of
from nowag_ext.embedding import check_embedding
from nowag_ext.methods import VQSettings, make_settings
from nowag_ext.normalize import as_weight
from nowag_ext.plan import Unit
from nowag_ext.weight_reads import weight_readers, weight_readers_text


@dataclass(frozen=True)
class HeadPlan:
    """A head to be packed, checked.

    Attributes:
        name: of the linear.
        unit: it, and how; its activation norms are not known yet.
        embedding: the name of the embedding that has the same weight, None if there is none.
    """

    name: str
    unit: Unit
    embedding: str | None


def head_settings(given: Mapping[str, Any]) -> VQSettings:
    """The checked settings of a head; raises ValueError or TypeError."""
    if not isinstance(given, Mapping):
        raise TypeError(f"head must be settings such as {{'d': 2, 'bits': 4}}, not {given!r:.100}.")
    try:
        settings = make_settings("vq", given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"head: {error}") from None
    assert isinstance(settings, VQSettings)
    if settings.n_init != 1:
        raise ValueError(
            f"head: its codebook is trained once: n_init must be 1, not {settings.n_init}."
        )
    return settings


def plan_head(model: Any, settings: VQSettings) -> HeadPlan:
    """The head of a causal LM, or of its outline on the meta device.

    Raises:
        ValueError: the model has none that can be packed; the sentence says why.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    name, embedding = name_of(model, head), name_of(model, embeddings)
    if type(head) is not nn.Linear or name is None:  # others may do more than it
        raise ValueError(
            f"head: the model has none that is an nn.Linear, but {type(head).__name__}: leave it "
            "dense."
        )
    if not head.weight.is_meta:
        try:
            as_weight(head.weight)
        except (TypeError, ValueError) as error:
            raise type(error)(f"head: {name}: {error}") from None
    if not isinstance(getattr(model, "_tied_weights_keys", None) or {}, Mapping):
        raise ValueError(
            "head: this model says what is tied in a way that only older releases of transformers "
            "read (_tied_weights_keys is a list): leave it dense."
        )
    sharing = _sharing(model, f"{name}.weight")
    tied = embedding is not None and f"{embedding}.weight" in sharing
    others = sharing - {f"{name}.weight"} - ({f"{embedding}.weight"} if tied else set())
    if others:
        raise ValueError(
            f"head: {name} shares its weight with {', '.join(sorted(others))}: leave it dense."
        )
    try:
        settings.check_layer(head.out_features, head.in_features)
    except ValueError as error:
        raise ValueError(f"head: {name} {error}.") from None
    read: dict[str, nn.Module] = {name: head}
    if tied:
        assert embedding is not None
        check_embedding(f"head: {embedding}, tied to {name},", embeddings)
        read[embedding] = embeddings
    readers = weight_readers(model, read)
    if readers:
        raise ValueError(f"head: {weight_readers_text(readers)}: leave it dense.")
    norms = torch.ones(head.in_features)
    return HeadPlan(name, Unit(head, norms, settings), embedding if tied else None)


def _sharing(model: Any, weight: str) -> set[str]:
    """All names of the parameter of this name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    same = {name for name, parameter in named.items() if parameter is named[weight]}
    if not named[weight].is_meta:
        return same
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(weight, weight)
    # Of weights without data transformers alone knows.
    return same | {name for pair in tied.items() if source in pair for name in pair}
