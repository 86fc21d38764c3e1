"""Graphs of decoders for tests: what counts captures and replays, and models to capture."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from tiny_models import random_act_norms, tiny_model
from torch import Tensor
from transformers import StaticCache

from nowag_ext import compress_model, decode_graph
from nowag_ext.cpu_graphs import CpuGraphs
from nowag_ext.graphs import Call, Captured, NoGraphError


class Captures(CpuGraphs):
    """Counts graphs and replays; what one returns is gone before the next."""

    def __init__(self, *, waits: bool = False, fails: bool = False) -> None:
        self.waits, self.fails = waits, fails
        self.graphs = self.replays = 0

    def first(self, step: Call, device: torch.device) -> Captured:
        assert device == torch.device("cpu")
        if self.fails:
            return Captured(step(), second=self.second)
        if self.waits:
            return Captured(step(), why="model.py:7 waits for the device")
        captured = super().first(step, device)
        if captured.replay is None:
            return captured
        self.graphs += 1

        def replay() -> None:
            self.replays += 1
            captured.output.logits.fill_(float("nan"))
            captured.replay()

        return Captured(captured.output, replay)

    def second(self, step: Call, device: torch.device) -> Captured:
        raise NoGraphError("operation not permitted when stream is capturing")


def model_of(architecture: str, packed: bool) -> Any:
    model = tiny_model(architecture)
    if packed:
        compress_model(model, random_act_norms(model), method="vq", d=4, bits=2, iters=2)
    return model


def forced(model: Any, ids: Tensor, graphs: Captures | None) -> Tensor:
    """The logits after each of a text's tokens, whatever the model would have written."""
    cache = StaticCache(model.config, max_cache_len=ids.shape[1])
    found = []
    with torch.no_grad(), decode_graph(model, graphs) if graphs else nullcontext():
        for token in ids.split(1, dim=1):
            found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)
