"""Linears of a layer that read the same: groups, their inputs, taps of the residual stream."""

from __future__ import annotations

import pytest
import torch
from families import (
    DOWN,
    GATE_UP,
    GROUPS,
    HIDDEN,
    LENGTH,
    MLP_ENDS,
    NEOX_ENDS,
    O_PROJ,
    OUTPUT,
    QKV,
    SIZES,
    TAPS,
    Recorded,
    assert_untouched,
    families,
    hidden_before,
    make_model,
    rows,
    shared_model,
    windows,
    without_layer,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
)

from nowag_ext.pipeline import blocks as blocks_of_a_model
from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.pipeline.capture import output_tensor


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
    assert ends == (NEOX_ENDS if family.startswith("gpt_neox") else MLP_ENDS)


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
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=HIDDEN)
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
        assert called == [*QKV, *O_PROJ]
        called.clear()
        blocks.taps(0, hidden, down, ends)
        assert called == [*GATE_UP, *DOWN]
        called.clear()
        blocks.taps(0, hidden, down)
        assert called == [*QKV, *O_PROJ, *GATE_UP, *DOWN]
    finally:
        for hook in hooks:
            hook.remove()


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
