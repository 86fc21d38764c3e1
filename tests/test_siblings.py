"""Linears that read the same input: found in one run of a token, computed together in the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same_bits
from families import make_model
from tiny_models import ARCHITECTURES, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vq_cases import random_vq

from nowag_ext import compress_model, ops
from nowag_ext.siblings import Joining, Learning

GROUP = torch.ops.nowag.vq_gemv_group.default
LINEAR = torch.ops.nowag.vq_linear.default


class Counting(TorchDispatchMode):
    """How many linears each call computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (GROUP, LINEAR):
            self.calls.append(len(args[1]) if func is GROUP else 1)
        return func(*args, **kwargs or {})


def packed_model(family: str = "llama") -> Any:
    model = tiny_model(family) if family in ARCHITECTURES else make_model(family)
    compress_model(model, random_act_norms(model), method="vq", d=2, bits=2, iters=2)
    return model.requires_grad_(False)


def learnt_and_joined(model: Any, ids: Tensor, other: Tensor) -> list[int]:
    """The sizes of the calls for ``other``, of which the model says what it says alone."""
    with torch.no_grad():
        learning = Learning()
        with learning:
            model(ids)
        want = model(other).logits
        with Counting() as counting, Joining(learning.siblings()):
            got = model(other).logits
    assert_same_bits(got, want)
    return counting.calls


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen2"])
def test_of_a_decoder(architecture: str, inference: bool) -> None:
    model = packed_model(architecture)
    with torch.inference_mode(inference):
        calls = learnt_and_joined(model, tiny_tokens(1, 3), tiny_tokens(2, 5))
    assert calls == [3, 1, 2, 1] * len(model.model.layers)


def test_attention_and_mlp_side_by_side() -> None:
    model = packed_model("cohere")
    calls = learnt_and_joined(model, tiny_tokens(1, 3), tiny_tokens(1, 3))
    assert calls == [5, 1, 1] * len(model.model.layers)


def test_too_many_tokens_stay_apart() -> None:
    model = packed_model()
    assert set(learnt_and_joined(model, tiny_tokens(1, 3), tiny_tokens(1, 17))) == {1}
    assert set(learnt_and_joined(model, tiny_tokens(1, 17), tiny_tokens(1, 3))) == {1}


def test_a_bias_made_for_one_call() -> None:
    """It is another the next time."""
    model = packed_model().bfloat16()
    attention = model.model.layers[0].self_attn
    for name in ("k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.bias = nn.Parameter(torch.randn(linear.out_features), requires_grad=False)
    attention.v_proj.bias.data = attention.v_proj.bias.bfloat16()
    calls = learnt_and_joined(model, tiny_tokens(1, 3), tiny_tokens(1, 3))
    assert sorted(calls[:3]) == [1, 1, 2]


class Halving(nn.Module):
    """A linear that halves what it has read, if it is told to."""

    def __init__(self, linear: nn.Module, on: bool) -> None:
        super().__init__()
        self.linear, self.on = linear, on

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.on:
            x.mul_(0.5)
        return y


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("then", [False, True])
def test_an_input_that_changes(learnt: bool, then: bool, inference: bool) -> None:
    """Joined is what read one content, whatever was learnt."""
    model = packed_model()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = Halving(mlp.gate_proj, learnt)
    ids = tiny_tokens(1, 3)
    with torch.inference_mode(inference), torch.no_grad():
        learning = Learning()
        with learning:
            model(ids)
        assert len(learning.siblings()) == 2 * len(model.model.layers) - learnt
        mlp.gate_proj.on = then
        want = model(ids).logits
        with Joining(learning.siblings()):
            assert_same_bits(model(ids).logits, want)


def test_siblings_that_are_called_alone() -> None:
    """In another order, for inputs of their own, or not at all."""
    model, ids = packed_model(), tiny_tokens(1, 3)
    with torch.no_grad():
        learning = Learning()
        with learning:
            model(ids)
        mlp = model.model.layers[0].mlp
        x, other = torch.randn(1, 3, mlp.gate_proj.in_features), torch.randn(1, 3, 64)
        want = [mlp.up_proj(x), mlp.gate_proj(x), mlp.gate_proj(other), mlp.up_proj(x)]
        with Counting() as counting, Joining(learning.siblings()):
            got = [mlp.up_proj(x), mlp.gate_proj(x), mlp.gate_proj(other), mlp.up_proj(x)]
    for one, wanted in zip(got, want, strict=True):
        assert_same_bits(one, wanted)
    assert counting.calls == [1, 2, 2]


def two_linears(rows: int = 64, cols: int = 32) -> list[tuple[Tensor, ...]]:
    return [random_vq(rows, cols, 2, 4, seed=seed) for seed in (1, 2)]


def test_weights_that_change_between_siblings() -> None:
    (one, two), x = two_linears(), torch.randn(2, 32)
    staged = random_vq(64, 32, 2, 4, seed=3)[0]

    def step() -> list[Tensor]:
        first = ops.vq_linear(x, *one, None)
        two[0].copy_(staged.flip(0))
        second = ops.vq_linear(x, *two, None)
        two[0].copy_(staged)
        return [first, second]

    with torch.no_grad():
        learning = Learning()
        with learning:
            want = step()
        assert not learning.siblings()
        plain = Learning()
        with plain:
            ops.vq_linear(x, *one, None)
            ops.vq_linear(x, *two, None)
        with Joining(plain.siblings()):
            got = step()
    for y, wanted in zip(got, want, strict=True):
        assert_same_bits(y, wanted)


def test_a_weight_and_a_part_of_it() -> None:
    (whole, _), x = two_linears(), torch.randn(2, 32)
    part = (whole[0][:1], whole[1], whole[2][:32], whole[3])
    with torch.no_grad():
        learning = Learning()
        with learning:
            want = [ops.vq_linear(x, *one, None) for one in (part, whole)]
        with Joining(learning.siblings()):
            got = [ops.vq_linear(x, *one, None) for one in (part, whole)]
    for y, wanted in zip(got, want, strict=True):
        assert_same_bits(y, wanted)


def test_another_dtype_than_siblings_have() -> None:
    one, two = two_linears()
    bias = nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)
    x = torch.randn(2, 32)
    narrow = x.bfloat16()
    with torch.no_grad():
        learning = Learning()
        with learning:
            ops.vq_linear(narrow, *one, None)
            ops.vq_linear(narrow, *two, bias)
        assert len(learning.siblings()) == 1
        with Joining(learning.siblings()):
            got = ops.vq_linear(x, *one, None)
    assert_same_bits(got, ops.vq_linear(x, *one, None))


def test_operations_of_a_higher_order() -> None:
    """They do not say what they write to."""
    (one, two), x = two_linears(), torch.randn(2, 32)

    def step() -> list[Tensor]:
        first = ops.vq_linear(x, *one, None)
        chosen = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return [first, chosen, ops.vq_linear(x, *two, None)]

    with torch.no_grad():
        want = step()
        learning = Learning()
        with learning:
            step()
        assert not learning.siblings()
        with Joining(learning.siblings()):
            got = step()
    for y, wanted in zip(got, want, strict=True):
        assert_same_bits(y, wanted)


def test_no_more_than_a_call_takes() -> None:
    model = packed_model()
    linears = [part for part in model.modules() if type(part).__name__ == "VQLinear"]
    same = [part for part in linears if part.in_features == linears[0].in_features]
    same = (same * 2)[: ops.VQ_MAX_MEMBERS + 2] if len(same) <= ops.VQ_MAX_MEMBERS else same
    x = torch.randn(2, linears[0].in_features)
    with torch.no_grad():
        learning = Learning()
        with learning:
            want = [linear(x) for linear in same]
        with Counting() as counting, Joining(learning.siblings()):
            got = [linear(x) for linear in same]
    for one, wanted in zip(got, want, strict=True):
        assert_same_bits(one, wanted)
    assert max(counting.calls) == ops.VQ_MAX_MEMBERS
