"""What is recorded of a token on a CPU, and replayed on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from families import CONFIGS, make_model
from graph_cases import Captures, forced, model_of
from tiny_models import random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import StaticCache

from nowag_ext import compress_model, cpu_graphs, decode_graph, ops
from nowag_ext.decoding import decodes_under_graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_families(family: str, dtype: torch.dtype) -> None:
    """What tapes have no steps for goes on through torch; either way nothing is left out."""
    model = make_model(family).to(dtype)
    ids, captures = tiny_tokens(2, 20), Captures()
    assert decodes_under_graph(model)
    want, got = forced(model, ids, None), forced(model, ids, captures)
    # One makes the cache, one is captured. Where windows slide only generate says all it takes.
    assert captures.replays == (0 if family == "gemma3" else 18)
    loss = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((got - want).norm() / want.norm()) < loss


@pytest.mark.parametrize("how", [{"method": "prune"}, {"method": "prune", "pattern": "2:4"}])
def test_pruned_models(how: dict[str, Any]) -> None:
    model = tiny_model("llama")
    compress_model(model, random_act_norms(model), **how)
    ids, captures = tiny_tokens(1, 20), Captures()
    want, got = forced(model, ids, None), forced(model, ids, captures)
    assert captures.replays == 18  # one makes the cache, one is captured
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_more_tokens_at_once_than_the_kernel_takes() -> None:
    model, ids = model_of("llama", packed=True), tiny_tokens(19, 6)
    captures = Captures()
    want, got = forced(model, ids, None), forced(model, ids, captures)
    assert captures.replays == 4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # that norms queries before keys
def test_linears_that_read_the_same_are_one_call(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(architecture, packed=True), tiny_tokens(1, 12)
    alone: list[int] = []
    linear = torch.ops.nowag.vq_linear.default

    def each(calls: Any) -> Any:
        alone.append(len(calls))
        return ops.vq_linears_call(calls)

    want = forced(model, ids, Captures())
    monkeypatch.setitem(cpu_graphs._KERNELS, linear, (each, ops.VQ_MAX_MEMBERS))
    assert_same_bits(forced(model, ids, Captures()), want)
    layers = len(model.model.layers)
    assert [size for size in alone if size > 1] == [3, 2] * layers
    monkeypatch.setitem(cpu_graphs._KERNELS, linear, (each, 2))
    alone.clear()
    assert_same_bits(forced(model, ids, Captures()), want)
    assert [size for size in alone if size > 1] == [2, 2] * layers
    monkeypatch.setitem(cpu_graphs._KERNELS, linear, (each, 1))
    assert_same_bits(forced(model, ids, Captures()), want)


class Halving(nn.Module):
    """A layer that leaves half of what it reads."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        x.mul_(0.5)
        return y


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_what_linears_read_may_change_between_them(part: str) -> None:
    model, ids, captures = model_of("llama", packed=True), tiny_tokens(1, 8), Captures()
    plain = forced(model, ids, None)
    mlp = model.model.layers[1].mlp
    setattr(mlp, part, Halving(getattr(mlp, part)))
    want, got = forced(model, ids, None), forced(model, ids, captures)
    assert captures.replays == 6
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(got, plain, rtol=1e-4, atol=1e-5) == (part == "up_proj")


class Raised(nn.Module):
    """A linear with a bias that Python makes for each token, and changes then."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        bias = torch.tensor([0.25] * linear.out_features)
        y = torch.ops.nowag.vq_linear(
            x, linear.codes, linear.codebook, linear.row_norms, linear.col_norms, bias
        )
        bias.add_(1)
        return y


def test_a_bias_of_numbers_that_changes() -> None:
    model, ids, captures = model_of("llama", packed=True), tiny_tokens(1, 8), Captures()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Raised(mlp.up_proj)
    want, got = forced(model, ids, None), forced(model, ids, captures)
    assert captures.replays == 6
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_wherever_new_tensors_are_made_by_default() -> None:
    model, ids = model_of("llama", packed=True), tiny_tokens(1, 4)
    want = forced(model, ids, Captures())
    linear = model.model.layers[0].mlp.gate_proj
    x = torch.randn(1, linear.in_features)
    weight = (linear.codes, linear.codebook, linear.row_norms, linear.col_norms)
    y = torch.ops.nowag.vq_linear(x, *weight, None)
    before = y.clone()
    with torch.device("meta"):
        call = ops.vq_linears_call([(y, (x, *weight))])
    y.zero_()
    call()
    assert_same_bits(y, before)
    assert_same_bits(forced(model, ids, Captures()), want)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])  # the other is made for each call
def test_weights_may_change_in_place(bias: torch.dtype) -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 16)
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=bias))
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad(), decode_graph(model, captures):
        for place in range(8):
            if place == 6:
                assert captures.replays == 4
                for weight in model.parameters():
                    if weight.is_floating_point():
                        weight.mul_(1.5)
            token = ids[:, place : place + 1]
            got = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            if place == 5:
                kept = copy.deepcopy(cache)
            elif place == 6:
                want = model.forward.__wrapped__(
                    input_ids=token, past_key_values=kept, use_cache=True
                ).logits
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_another_number_of_threads(threads: int) -> None:
    """Asked for at each token; the bits are the same."""
    model, ids = model_of("llama", packed=True), tiny_tokens(1, 12)
    want = forced(model, ids, Captures())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(forced(model, ids, Captures()), want)
    finally:
        torch.set_num_threads(before)


class Looking(nn.Module):
    """A layer that goes by what a tensor holds."""

    def __init__(self, layer: nn.Module, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.look = layer, look

    def forward(self, x: Tensor) -> Tensor:
        self.look(x.float())
        return self.layer(x)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x.sum()),
    "tolist": Tensor.tolist,
    "numpy": Tensor.numpy,
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": torch.nonzero,
    "index": lambda x: [1, 2][(x.sum() > 0).long()],
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tensor": lambda x: torch.tensor([x.mean(), 2.0]),
    "deepcopy": copy.deepcopy,
    "dlpack": lambda x: np.from_dlpack(x),
    "where": lambda x: torch.where(x > 0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_models_that_look_into_tensors_stay_eager(look: str, inference: bool) -> None:
    """In inference mode torch does not take its operations apart by itself."""
    model, ids, captures = tiny_model("llama"), tiny_tokens(1, 6), Captures()
    with torch.inference_mode(inference):
        check_that_it_stays_eager(model, ids, captures, look)


def check_that_it_stays_eager(model: Any, ids: Tensor, captures: Captures, look: str) -> None:
    want = forced(model, ids, None)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Looking(mlp.up_proj, LOOKS[look])
    with pytest.warns(UserWarning, match="not be captured as a graph.*it looks into a tensor"):
        got = forced(model, ids, captures)
    assert torch.equal(got, want)
    assert captures.graphs == 0


@torch.library.custom_op("nowag_tests::decayed", mutates_args={"state"})
def decayed(x: Tensor, state: Tensor) -> Tensor:
    state.mul_(0.5).add_(x.mean())
    return x * state


def summed(x: Tensor) -> Tensor:
    """Into what Python makes anew for each token."""
    total = torch.tensor(0.0)
    total += x.mean()
    return x + total


STATE = torch.zeros(())
UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "number made and written to": summed,
    "writes and returns": lambda x: decayed(x, STATE),
    "list of one": lambda x: torch._foreach_mul([x], 2.0)[0],
    "list of two": lambda x: torch._foreach_mul([x, x], 2.0)[1],
    "two results": lambda x: x * torch.max(x, -1, keepdim=True)[0],
    "its own input": lambda x: x.contiguous().to(x.dtype),
    "mean of a number": lambda x: x * x.sum().mean(-1),
    "in place, through a view": lambda x: x.clone().view(-1).mul_(2).view_as(x),
    "sorted": lambda x: x.sort(-1)[0],
}


class Changing(nn.Module):
    """A layer of which something else is made."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", UNUSUAL)
def test_unusual_operations(change: str, inference: bool) -> None:
    model, ids, captures = tiny_model("llama"), tiny_tokens(1, 8), Captures()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Changing(mlp.up_proj, UNUSUAL[change])
    with torch.inference_mode(inference):
        found = []
        for graphs in (None, captures):
            STATE.zero_()
            found.append(forced(model, ids, graphs))
    assert captures.replays == 6
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_nobody_looks_at_anything() -> None:
    """A slot of a batch that is idle: torch's attention gives 0 there, and so does a tape's."""
    model, ids = model_of("llama", packed=True), tiny_tokens(2, 8)
    logits = []
    for graphs in (None, Captures()):
        cache = StaticCache(model.config, max_cache_len=8)
        with torch.no_grad(), decode_graph(model, graphs) if graphs else nullcontext():
            for place, token in enumerate(ids.split(1, dim=1)):
                mask = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
                mask[1, ..., : place + 1] = True
                given = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
                logits.append(model(input_ids=token, **given).logits)
    want, got = torch.cat(logits[:8], 1), torch.cat(logits[8:], 1)
    assert graphs is not None
    assert graphs.replays == 6
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
