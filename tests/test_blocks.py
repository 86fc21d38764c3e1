"""Decoder layers one at a time: the model's own arithmetic, its head, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from families import (
    AFTER_ATTENTION,
    GROUPS,
    HIDDEN,
    LENGTH,
    SIZES,
    Recorded,
    assert_untouched,
    families,
    make_model,
    rows,
    shared_model,
    windows,
    without_layer,
)
from tiny_models import VOCABULARY, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from nowag_ext import VQLinear, compress_model
from nowag_ext.decoder import decoder_layers
from nowag_ext.pipeline.blocks import Blocks, Group
from nowag_ext.pipeline.head import Head


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
def test_layers_one_by_one_are_the_model_bit_for_bit(family: str, attention: str) -> None:
    model = make_model(family, attention=attention)
    blocks = Blocks(model, LENGTH)
    ids = windows()
    whole = Recorded(model, ids)
    assert blocks.layers == tuple(decoder_layers(model))
    hidden = blocks.embed(ids)
    for index, name in enumerate(blocks.layers):
        assert torch.equal(hidden, whole.states[index])
        hidden = blocks.run(index, hidden)
        assert torch.equal(hidden, whole.returned[name])
    norm = getattr(model.base_model, "norm", None) or model.base_model.final_layer_norm
    with torch.no_grad():
        assert torch.equal(norm(hidden), whole.states[-1])


@families
def test_head_is_the_models_own(family: str) -> None:
    model = make_model(family)
    blocks = Blocks(model, LENGTH)
    tokens = windows(2)
    hidden = blocks.embed(tokens)
    for index in range(len(blocks.layers)):
        hidden = blocks.run(index, hidden)
    with torch.no_grad():
        wanted = model(tokens).logits
        found = Head(model, blocks)(hidden)
        part = Head(model, blocks)(hidden[:, 3:7])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(part, wanted[:, 3:7])


@pytest.mark.parametrize("tied", [True, False])
def test_what_two_heads_have_in_common_is_copied_once(tied: bool) -> None:
    model = tiny_model("llama" if tied else "qwen3", dtype=torch.bfloat16)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    hidden = Blocks(model, LENGTH).embed(windows(2)).float()
    first = Head(model, Blocks(model, LENGTH))
    second = Head(other, Blocks(other, LENGTH), like=first)
    assert sum(tensor.numel() for tensor in first.tensors()) == (
        model.lm_head.weight.numel() + model.model.norm.weight.numel()
    )
    equal = [a is b for a, b in zip(first.tensors(), second.tensors(), strict=True)]
    assert sorted(equal) == [False, True]
    assert_same_bits(second(hidden), Head(other, Blocks(other, LENGTH))(hidden))
    assert not torch.equal(second(hidden), first(hidden))


def test_each_layer_has_its_own_arguments() -> None:
    """A full layer called like a sliding one would be noticed above."""
    blocks = Blocks(shared_model("gemma3"), LENGTH)
    hidden = blocks.embed(windows())
    sliding, full, _ = blocks.layers
    right = blocks.run(0, hidden)
    blocks._calls[sliding] = blocks._calls[full]
    assert not torch.allclose(blocks.run(0, hidden), right, atol=1e-2)


def test_packed_modules_of_the_same_names() -> None:
    model = make_model("llama")
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    dense = blocks.groups(0, hidden)
    compress_model(model, random_act_norms(model), d=4, bits=1, iters=1)
    assert blocks.linears(0) == ()
    assert blocks.groups(0, hidden, VQLinear) == dense
    whole = Recorded(model, windows())
    assert torch.equal(blocks.run(0, hidden), whole.returned[blocks.layers[0]])
    for group in dense:
        inputs, sums, _ = blocks.taps(0, hidden, group)
        assert torch.equal(inputs, rows(whole.read[group.names[0]]))
        assert len(sums) == sum(tap is not None for tap in group.taps)


class Returning(nn.Module):
    """A layer whose output is in a tuple, as older ones have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, str]:
        return self.layer(hidden_states, **kwargs), "more"


def use_tuples(model: Any) -> None:
    """Wraps the layers of a Llama, and its loop over them."""
    base = model.model
    for index, layer in enumerate(base.layers):
        base.layers[index] = Returning(layer)

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = base.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        embeddings = base.rotary_emb(hidden, positions)
        for layer in base.layers:
            hidden, more = layer(hidden_states=hidden, position_embeddings=embeddings)
            assert more == "more"
        return base.norm(hidden)

    base.forward = forward


def test_layers_that_return_tuples_and_take_hidden_states_by_name() -> None:
    model = make_model("llama")
    plain = Recorded(model, windows())
    use_tuples(model)
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    for index in range(len(blocks.layers)):
        groups = blocks.groups(index, hidden)
        names, taps = without_layer(f"{blocks.layers[index]}.layer", groups)
        assert names == GROUPS["llama"]
        assert taps.pop("mlp.down_proj") == blocks.layers[index]
        assert taps == {"self_attn.o_proj": AFTER_ATTENTION}
        hidden = blocks.run(index, hidden)
    with torch.no_grad():
        assert torch.equal(model.model.norm(hidden), plain.states[-1])


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    groups = blocks.groups(0, hidden)
    with pytest.raises(IndexError):
        blocks.embed(torch.full((1, LENGTH), VOCABULARY))
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = Broken()
    for work in (
        lambda: blocks.run(0, hidden),
        lambda: blocks.groups(0, hidden),
        lambda: blocks.taps(0, hidden, Group(("model.layers.0.mlp.x",), 1, (None,), (None,))),
        lambda: blocks.taps(
            0, hidden, Group(groups[1].names, HIDDEN, ("model.layers.0",), (None,))
        ),
        lambda: Blocks(model, LENGTH),
    ):
        with pytest.raises(RuntimeError, match="broken"):
            work()
    model.model.layers[0].mlp = mlp
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert_untouched(model)


def test_wrapped_forwards_are_put_back() -> None:
    """As accelerate has them, in the layer's own attributes."""
    model = make_model("llama")
    layer = model.model.layers[0]
    own = layer.forward
    called: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    layer.forward = wrapper
    blocks = Blocks(model, LENGTH)
    called.clear()
    blocks.run(0, blocks.embed(windows()))
    assert called == [1]
    assert layer.forward is wrapper


def test_dropout_is_off_and_no_gradients_are_kept() -> None:
    config = Phi3Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    blocks = Blocks(model, LENGTH)
    with torch.inference_mode():
        hidden = blocks.run(0, blocks.embed(windows()))
    assert not hidden.is_inference()
    assert not hidden.requires_grad
    assert torch.equal(hidden, blocks.run(0, blocks.embed(windows())))
    assert blocks.groups(1, hidden)[1].taps == ("model.layers.1.post_attention_layernorm",)


def test_hidden_states_of_inference_mode() -> None:
    blocks = Blocks(
        shared_model("olmo2"), LENGTH
    )  # whose queries read the hidden states themselves
    with torch.inference_mode():
        hidden = blocks.embed(windows()) * 1
    layer = blocks.layers[0]
    assert hidden.is_inference()
    assert without_layer(layer, blocks.groups(0, hidden))[0] == GROUPS["olmo2"]


# Models that cannot be run layer by layer.


def mixing(model: Any) -> None:
    """The second layer reads what the first has returned, and what that had read."""
    first, second = model.model.layers[:2]
    kept: list[Tensor] = []
    first.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    second.register_forward_pre_hook(lambda _m, args: ((args[0] + kept[-1]) / 2, *args[1:]))


def argument(make: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    """Gives the second layer one more argument, made from the token ids."""

    def change(model: Any) -> None:
        ids: list[Tensor] = []
        model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: ids.append(args[0]))
        model.model.layers[1].register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "extra": make(ids[-1])}), with_kwargs=True
        )

    return change


def never(model: Any) -> None:
    model.config.num_hidden_layers = 2


def backwards(model: Any) -> None:
    base = model.model
    loop = base.forward

    def forward(**kwargs: Any) -> Any:
        layers = base.layers
        base.layers = nn.ModuleList(reversed(layers))
        try:
            return loop(**kwargs)
        finally:
            base.layers = layers

    base.forward = forward


def repeated(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def two_lists(model: Any) -> None:
    model.model.more = nn.ModuleList([nn.Linear(2, 2)])


def no_list(model: Any) -> None:
    model.model.layers = nn.Sequential(*model.model.layers)


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "mixing": (mixing, r"what model\.layers\.1 reads is not what the layer before it returns"),
    "text": (argument(lambda ids: ids[:1] + 0.5), r"arguments of model\.layers\.1 depend on the t"),
    "text, first": (argument(lambda ids: int(ids[-1, 0])), r"arguments of model\.layers\.1 depend"),
    "windows": (
        argument(lambda ids: torch.zeros(len(ids) + 1, 1)),
        r"arguments of model\.layers\.1 depend on the text or on the number of windows",
    ),
    "structure": (argument(lambda ids: [None] * len(ids)), r"arguments of model\.layers\.1 depend"),
    "object": (argument(lambda ids: object()), r"calls model\.layers\.1 with a object, which may"),
    "never": (never, r"never calls model\.layers\.2"),
    "backwards": (backwards, r"calls model\.layers\.2 twice or out of order"),
    "repeated": (repeated, r"calls model\.layers\.1 twice or out of order"),
    "two lists": (two_lists, r"one nn\.ModuleList, but it has 2 \(model\.layers, model\.more\)"),
    "no list": (no_list, r"one nn\.ModuleList, but it has none"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_models_that_cannot_be_run_layer_by_layer(change: str) -> None:
    model = make_model("llama")
    damage, sentence = REFUSED[change]
    damage(model)
    with pytest.raises(ValueError, match=sentence):
        Blocks(model, LENGTH)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_arguments_that_broadcast_over_windows_are_taken() -> None:
    model = make_model("llama")
    argument(lambda ids: torch.zeros(len(ids), 1))(model)
    Blocks(model, LENGTH)


def test_encoders_are_refused() -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        Blocks(T5ForConditionalGeneration(config), LENGTH)


def test_other_lengths_are_refused() -> None:
    blocks = Blocks(shared_model("llama"), LENGTH)
    hidden = blocks.embed(windows())
    with pytest.raises(ValueError, match=r"token ids must have shape \[windows, 20\], not \(2, 7"):
        blocks.embed(tiny_tokens(2, 7))
    with pytest.raises(ValueError, match=r"shape \[windows, 20, hidden_size\], not \(3, 9, 32\)"):
        blocks.run(0, hidden[:, :9])
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        Blocks(shared_model("llama"), 0)
