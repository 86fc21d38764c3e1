"""Decoder layers one at a time: the model's own arithmetic, groups, taps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, random_act_norms, tiny_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from nowag_ext import VQLinear, compress_model
from nowag_ext.decoder import decoder_layers
from nowag_ext.pipeline import blocks as blocks_of_a_model
from nowag_ext.pipeline.blocks import Blocks, Group
from nowag_ext.pipeline.capture import output_tensor
from nowag_ext.pipeline.head import Head

LENGTH = 20
HIDDEN = 32

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,  # of 8, so that queries have the shape of hidden states
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_SIZES),
    "cohere": lambda: CohereConfig(**_SIZES),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "gpt_neox sequential": lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "granite": lambda: GraniteConfig(**_SIZES, residual_multiplier=0.22),
}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_O, _DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
_LLAMA = [_QKV, _O, _GATE_UP, _DOWN]
_GPT_NEOX = [
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3": _LLAMA,
    "phi3": [("self_attn.qkv_proj",), _O, ("mlp.gate_up_proj",), _DOWN],
    "cohere": [(*_QKV, *_GATE_UP), _O, _DOWN],
    "olmo2": _LLAMA,
    "gpt_neox": _GPT_NEOX,
    "gpt_neox sequential": _GPT_NEOX,
    "granite": _LLAMA,
}
AFTER_ATTENTION = "post_attention_layernorm"
OUTPUT = ""  # the layer's own
_SEQUENTIAL = {"self_attn.o_proj": AFTER_ATTENTION, "mlp.down_proj": OUTPUT}
TAPS: dict[str, dict[str, str]] = {
    "llama": _SEQUENTIAL,
    "qwen3": _SEQUENTIAL,
    "gemma3": {},
    "phi3": _SEQUENTIAL,
    "cohere": {"self_attn.o_proj": OUTPUT, "mlp.down_proj": OUTPUT},
    "olmo2": {},
    "gpt_neox": {"attention.dense": OUTPUT, "mlp.dense_4h_to_h": OUTPUT},
    "gpt_neox sequential": {"attention.dense": AFTER_ATTENTION, "mlp.dense_4h_to_h": OUTPUT},
    "granite": {},
}
_MLP_ENDS = {"mlp.down_proj": "mlp", "self_attn.o_proj": "self_attn"}
_NEOX_ENDS = {"attention.dense": "attention", "mlp.dense_4h_to_h": "mlp"}
families = pytest.mark.parametrize("family", CONFIGS)


def make_model(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@cache
def shared_model(family: str) -> Any:
    """For tests that change nothing of it."""
    return make_model(family)


def windows(count: int = 3, seed: int = 1) -> Tensor:
    return tiny_tokens(count, LENGTH, seed=seed)


def hidden_before(blocks: Blocks, index: int, ids: Tensor) -> Tensor:
    hidden = blocks.embed(ids)
    for earlier in range(index):
        hidden = blocks.run(earlier, hidden)
    return hidden


class Recorded:
    """What one forward of a whole model has shown: what modules read, and what they returned."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.read: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            self.states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if given is not None:
                self.read[name] = given.clone()
            if isinstance(output, Tensor):
                self.returned[name] = output.clone()

        return hook


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


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


def test_each_layer_has_its_own_arguments() -> None:
    """A full layer called like a sliding one would be noticed above."""
    blocks = Blocks(shared_model("gemma3"), LENGTH)
    hidden = blocks.embed(windows())
    sliding, full, _ = blocks.layers
    right = blocks.run(0, hidden)
    blocks._calls[sliding] = blocks._calls[full]
    assert not torch.allclose(blocks.run(0, hidden), right, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere", "granite"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    blocks = Blocks(model, LENGTH)
    whole = Recorded(model, windows())
    hidden = blocks.embed(windows())
    assert hidden.dtype == dtype
    for index, name in enumerate(blocks.layers):
        groups = blocks.groups(index, hidden[:1])
        assert without_layer(name, groups) == (GROUPS[family], TAPS[family])
        hidden = blocks.run(index, hidden)
        assert torch.equal(hidden, whole.returned[name])


def without_layer(layer: str, groups: list[Group]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Names in the groups and taps by linear, as they are called within the layer."""
    names = [tuple(name.removeprefix(f"{layer}.") for name in group.names) for group in groups]
    taps = {
        name.removeprefix(f"{layer}."): "" if tap == layer else tap.removeprefix(f"{layer}.")
        for group in groups
        for name, tap in zip(group.names, group.taps, strict=True)
        if tap is not None
    }
    return names, taps


@families
def test_groups_inputs_and_taps(family: str) -> None:
    model = shared_model(family)
    blocks = Blocks(model, LENGTH)
    ids = windows()
    whole = Recorded(model, ids)
    for index, layer in enumerate(blocks.layers):
        hidden = whole.states[index]
        groups = blocks.groups(index, hidden[:1])
        assert without_layer(layer, groups) == (GROUPS[family], TAPS[family])
        for group in groups:
            assert len(group.names) == len(group.taps)
            inputs, sums, _ = blocks.taps(index, hidden, group)
            for name, tap in zip(group.names, group.taps, strict=True):
                assert group.in_features == model.get_submodule(name).in_features
                assert torch.equal(inputs, rows(whole.read[name]))
                assert (name in sums) == (tap is not None)
                if tap is not None:
                    seen = whole.returned if tap == layer else whole.read
                    assert torch.equal(sums[name], rows(seen[tap]))


@families
def test_modules_end_with_a_linear(family: str) -> None:
    blocks = Blocks(shared_model(family), LENGTH)
    hidden = blocks.embed(windows())
    layer = blocks.layers[0]
    ends = {
        name.removeprefix(f"{layer}."): end.removeprefix(f"{layer}.")
        for group in blocks.groups(0, hidden[:1])
        for name, end in zip(group.names, group.ends, strict=True)
        if end is not None
    }
    assert ends == (_NEOX_ENDS if family.startswith("gpt_neox") else _MLP_ENDS)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox"])
def test_taps_are_the_residual_stream_and_the_output(family: str) -> None:
    model = shared_model(family)
    blocks = Blocks(model, LENGTH)
    ids = windows()
    whole = Recorded(model, ids)
    layer = blocks.layers[1]
    hidden = whole.states[1]
    returned = {
        name.removeprefix(f"{layer}."): rows(output)
        for name, output in whole.returned.items()
        if name.startswith(f"{layer}.")
    }
    taps: dict[str, Tensor] = {}
    for group in blocks.groups(1, hidden):
        taps.update(blocks.taps(1, hidden, group)[1])
    attention, mlp = TAPS[family]
    middle, end = (taps[f"{layer}.{name}"] for name in (attention, mlp))
    both = rows(hidden) + returned[attention] + returned[mlp]
    torch.testing.assert_close(end, both, rtol=1e-5, atol=1e-5)
    if family == "llama":
        both = rows(hidden) + returned[attention]
    torch.testing.assert_close(middle, both, rtol=1e-5, atol=1e-5)


@families
def test_silent_linears_leave_the_residual_stream_as_it_was(family: str) -> None:
    model = make_model(family)
    for parameter in model.parameters():  # biases are zeros to begin with
        nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    for group in blocks.groups(0, hidden):
        inputs, sums, ends = blocks.taps(0, hidden, group)
        silent = blocks.taps(0, hidden, group, silent=True)
        assert torch.equal(silent.inputs, inputs)
        assert silent.sums.keys() == sums.keys()
        assert silent.ends.keys() == ends.keys()
        for name, total in sums.items():
            linear = model.get_submodule(name)
            added = inputs @ linear.weight.T
            torch.testing.assert_close(silent.sums[name] + added, total, rtol=1e-5, atol=1e-5)
            assert (added.abs().mean(0) > 0).all()


@families
def test_most_of_what_finds_groups_takes_the_first_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Blocks(shared_model(family), LENGTH)
    monkeypatch.setattr(blocks_of_a_model, "_TRACE_TOKENS", 5)
    blocks = Blocks(shared_model(family), LENGTH).copied(1)
    hidden = hidden_before(whole, 1, windows())
    read: list[int] = []
    part = blocks._layers[blocks.layers[1]]
    part.register_forward_hook(lambda *given: read.append(output_tensor(given[2]).shape[1]))
    assert blocks.groups(1, hidden[:1]) == whole.groups(1, hidden[:1])
    assert read.count(LENGTH) == 1
    assert set(read) == {5, LENGTH}


class LateExpert(nn.Module):
    """A linear that no token before the eighth is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] < 8 else torch.cat([x[:, :7], self.late(x[:, 7:])], 1)


class InPieces(nn.Module):
    """A linear that reads long texts in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(piece) for piece in x.split(8, 1)], 1)


def test_what_happens_in_long_windows_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = InPieces()
    monkeypatch.setattr(blocks_of_a_model, "_TRACE_TOKENS", 5)
    blocks = Blocks(model, LENGTH)
    with pytest.raises(ValueError, match="is called twice in its layer: it has no one input"):
        blocks.groups(0, blocks.embed(windows())[:1])


def test_groups_are_found_from_a_whole_window_where_that_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = LateExpert()
    monkeypatch.setattr(blocks_of_a_model, "_TRACE_TOKENS", 5)
    blocks = Blocks(model, LENGTH)
    groups = blocks.groups(0, blocks.embed(windows())[:1])
    assert [name.rpartition(".")[2] for name in groups[-1].names] == ["late"]


class TwoSums(nn.Module):
    """Two linears that read the same, both added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_a_sum_that_two_linears_of_a_group_add_to_is_no_tap() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = TwoSums()
    blocks = Blocks(model, LENGTH)
    group = blocks.groups(0, blocks.embed(windows()))[-1]
    assert [name.rpartition(".")[2] for name in group.names] == ["one", "two"]
    assert group.taps == (None, None)


def test_residual_streams_of_flattened_rows() -> None:
    config = OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=HIDDEN)
    torch.manual_seed(0)
    blocks = Blocks(AutoModelForCausalLM.from_config(config), LENGTH)
    groups = blocks.groups(1, hidden_before(blocks, 1, windows()))
    taps = without_layer(blocks.layers[1], groups)[1]
    assert taps == {"self_attn.out_proj": "final_layer_norm", "fc2": OUTPUT}


def test_a_module_that_reads_twice_shows_no_tap() -> None:
    model = make_model("llama")
    layer = model.model.layers[0]
    layer.input_layernorm = layer.post_attention_layernorm
    blocks = Blocks(model, LENGTH)
    groups = blocks.groups(0, blocks.embed(windows()))
    assert without_layer(blocks.layers[0], groups)[1] == {"mlp.down_proj": OUTPUT}


def test_a_layer_is_run_no_further_than_needed() -> None:
    model = shared_model("llama")
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    attention, output, _, down = blocks.groups(0, hidden)
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        blocks.taps(0, hidden, attention)  # none: no further
        assert called == ["self_attn.q_proj"]
        called.clear()
        _, _, ends = blocks.taps(0, hidden, output)
        assert called == [*_QKV, *_O]
        called.clear()
        blocks.taps(0, hidden, down, ends)
        assert called == [*_GATE_UP, *_DOWN]
        called.clear()
        blocks.taps(0, hidden, down)
        assert called == [*_QKV, *_O, *_GATE_UP, *_DOWN]
    finally:
        for hook in hooks:
            hook.remove()


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


class Router(nn.Linear):
    """Llama 4's returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.sigmoid(), scores


class Experts(nn.Module):
    """Tokens whose first element is positive go to one expert, no token to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(HIDDEN, 1)
        self.used, self.idle = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, _ = self.router(x)
        flat = rows(x).clone()
        routed = flat[:, 0] > 0
        if routed.any():
            flat[routed] = self.used(flat[routed])
        return weights * flat.reshape(x.shape)


def test_experts_see_their_tokens_and_may_see_none() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = Experts()
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    groups = blocks.groups(0, hidden)
    called = {name for group in groups for name in group.names}
    assert set(blocks.linears(0)) - called == {"model.layers.0.mlp.idle"}
    group = groups[-1]
    assert group.names == ("model.layers.0.mlp.used",)
    assert group.taps == (None,)
    routed = blocks.taps(0, hidden, group).inputs
    assert 0 < len(routed) < hidden.shape[0] * LENGTH
    assert (routed[:, 0] > 0).all()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = 0
    assert blocks.taps(0, hidden, group).inputs.shape == (0, HIDDEN)
    assert blocks.taps(0, hidden, group)[0].shape == (0, HIDDEN)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.same(x))


def test_a_linear_called_twice_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = Twice()
    blocks = Blocks(model, LENGTH)
    hidden = hidden_before(blocks, 1, windows())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.same is called twice"):
        blocks.groups(1, hidden)
    assert_untouched(model)


class InPlace(nn.Module):
    """Two linears read one piece of memory, with something written to it in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.view = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out = self.one(x)
        x.mul_(2)
        out += self.two(x)
        return out.add_(self.view(x.transpose(0, 1)).transpose(0, 1))


def test_groups_read_the_same_values_of_the_same_memory() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp = InPlace()
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(windows())
    groups = blocks.groups(0, hidden)[2:]
    mlp = "model.layers.0.mlp"
    assert [group.names for group in groups] == [(f"{mlp}.one",), (f"{mlp}.two",), (f"{mlp}.view",)]
    # The first's output is written into, the second's and third's are added to that.
    assert [group.taps for group in groups] == [("model.layers.0",)] * 2 + [(None,)]
    whole = Recorded(model, windows())
    for group in groups:
        want = rows(whole.read[group.names[0]])
        assert torch.equal(blocks.taps(0, hidden, group).inputs, want)
        assert torch.equal(blocks.taps(0, hidden, group)[0], want)


def assert_untouched(model: Any) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)


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
    config = Phi3Config(**_SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
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
