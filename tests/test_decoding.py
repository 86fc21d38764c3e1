"""Generation under a graph: what is recorded on a CPU, and which calls of a model are replayed."""

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
from tiny_models import ARCHITECTURES, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import AutoConfig, GemmaConfig, MistralConfig, StaticCache

from nowag_ext import compress_model, cpu_graphs, decode_graph, ops
from nowag_ext.cpu_graphs import CpuGraphs
from nowag_ext.decoding import decodes_under_graph, has_plain_cache
from nowag_ext.generate import generate
from nowag_ext.graphs import Call, Captured, NoGraphError

NEW = 12
REPLAYED = NEW - 2  # the prompt gives a token, and one is captured


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


def generated(model: Any, ids: Tensor, captures: Captures | None, **more: Any) -> Tensor:
    torch.manual_seed(0)
    settings = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW,
        "do_sample": False, "pad_token_id": 0, **more,
    }  # fmt: skip
    if captures is None:
        return model.generate(ids, **settings)
    with decode_graph(model, captures):
        return model.generate(ids, cache_implementation="static", disable_compile=True, **settings)


def model_of(architecture: str, packed: bool) -> Any:
    model = tiny_model(architecture)
    if packed:
        compress_model(model, random_act_norms(model), method="vq", d=4, bits=2, iters=2)
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_writes_what_is_written_without(architecture: str, packed: bool) -> None:
    model, captures = model_of(architecture, packed), Captures()
    for length, batch in ((7, 1), (3, 2)):
        ids = tiny_tokens(batch, length)
        want = generated(model, ids, None)
        assert torch.equal(generated(model, ids, captures), want)
    assert captures.graphs == 2  # a cache each
    assert captures.replays == 2 * REPLAYED
    assert "forward" not in vars(model)


def test_draws_what_is_drawn_without() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 5)
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    want = generated(model, ids, None, **drawn)
    assert torch.equal(generated(model, ids, captures, **drawn), want)
    assert captures.replays == REPLAYED


def test_padded_prompts() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = generated(model, ids, None, attention_mask=mask)
    assert torch.equal(generated(model, ids, captures, attention_mask=mask), want)
    assert captures.replays == REPLAYED


def test_generate_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captures = model_of("llama", packed=True), Captures()
    model.generation_config.eos_token_id = None

    class Tokenizer:
        pad_token_id = 0

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    ids = tiny_tokens(1, 5)
    monkeypatch.setattr("nowag_ext.generate.decodes_under_graph", lambda *_: False)
    want = generate(model, Tokenizer(), ids, max_new_tokens=NEW)
    monkeypatch.undo()
    monkeypatch.setattr("nowag_ext.decoding.CpuGraphs", lambda: captures)
    shown: list[str] = []
    got = generate(model, Tokenizer(), ids, max_new_tokens=NEW, show=shown.append)
    assert (got.text, got.tokens) == (want.text, NEW)
    assert "".join(shown).split() == want.text.split()
    assert captures.replays == REPLAYED


@pytest.mark.parametrize("what", ["waits", "fails"])
def test_goes_on_where_nothing_can_be_captured(what: str) -> None:
    model, ids = model_of("llama", packed=True), tiny_tokens(1, 5)
    want = generated(model, ids, None)
    with pytest.warns(UserWarning, match=r"could not be captured .*(waits for the|is capturing)"):
        got = generated(model, ids, Captures(**{what: True}))
    assert torch.equal(got, want)


def test_beams_replace_the_tensors_of_the_cache() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 5)
    want = generated(model, ids, None, num_beams=3)
    assert torch.equal(generated(model, ids, captures, num_beams=3), want)
    assert captures.replays == 0


def test_what_is_returned_is_the_callers() -> None:
    """Scores, which generate copies; logits of a loop of one's own; hidden states, if asked for."""
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 5)
    more = {"return_dict_in_generate": True, "output_logits": True}
    want, got = (generated(model, ids, one, **more) for one in (None, captures))
    assert captures.replays == REPLAYED
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other)
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad(), decode_graph(model, captures):
        model(ids, past_key_values=cache, use_cache=True)
        logits = [
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
            for _ in range(4)
        ]
    assert captures.replays == REPLAYED + 3
    assert all(not torch.equal(one, logits[-1]) for one in logits[:-1])
    with pytest.warns(UserWarning, match="hidden_states is returned, which later tokens"):
        got = generated(model, ids, captures, output_hidden_states=True, **more)
    assert captures.replays == REPLAYED + 3
    want = generated(model, ids, None, output_hidden_states=True, **more)
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(one[-1], other[-1])


def test_what_is_no_token_of_a_static_cache_runs_as_ever() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 5)
    with torch.no_grad():
        want = model(ids).logits
    with decode_graph(model, captures):
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(model(ids).logits, want)
                assert torch.equal(model(input_ids=ids).logits, want)
            model(input_ids=ids[:, :1]).logits.sum().backward()
        dynamic = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert captures.graphs == 0
    assert torch.equal(dynamic, generated(model, ids, None, max_new_tokens=6, min_new_tokens=None))


def test_leaves_a_forward_that_the_model_has_of_its_own() -> None:
    model = tiny_model("llama")
    model.forward = own = model.forward
    with decode_graph(model, Captures()):
        assert model.forward is not own
    assert model.forward is own


def test_which_models_it_is_for() -> None:
    model = tiny_model("llama")
    assert decodes_under_graph(model)
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not decodes_under_graph(model)
    hook.remove()
    assert not decodes_under_graph(nn.Linear(1, 1, device="meta"))
    model._can_compile_fullgraph = False
    assert not decodes_under_graph(model)
    assert all(has_plain_cache(tiny_model(name).config, 100) for name in ARCHITECTURES)
    assert has_plain_cache(GemmaConfig(), 100)
    assert has_plain_cache(MistralConfig(sliding_window=64), 64)
    assert not has_plain_cache(MistralConfig(sliding_window=64), 65)
    assert not has_plain_cache(AutoConfig.for_model("mamba"), 1)


def forced(model: Any, ids: Tensor, graphs: Captures | None) -> Tensor:
    """The logits after each of a text's tokens, whatever the model would have written."""
    cache = StaticCache(model.config, max_cache_len=ids.shape[1])
    found = []
    with torch.no_grad(), decode_graph(model, graphs) if graphs else nullcontext():
        for token in ids.split(1, dim=1):
            found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


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


def test_within_another() -> None:
    model, ids = model_of("llama", packed=True), tiny_tokens(1, 12)
    want = forced(model, ids, None)
    cache = StaticCache(model.config, max_cache_len=12)
    outer, inner, found = Captures(), Captures(), []

    def read(tokens: Tensor) -> None:
        for token in tokens.split(1, dim=1):
            found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)

    with torch.no_grad(), decode_graph(model, outer):
        read(ids[:, :6])
        with decode_graph(model, inner):
            read(ids[:, 6:])
    assert (outer.replays, inner.graphs) == (10, 0)
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-5)


def test_a_cache_that_is_full() -> None:
    """As in an eager token, there is no place to write to."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 1)
    cache = StaticCache(model.config, max_cache_len=5)
    with torch.no_grad(), decode_graph(model):
        for _ in range(5):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="outside the contract"):
            model(input_ids=ids, past_key_values=cache, use_cache=True)


def test_graphs_that_capture_the_second_token() -> None:
    """As CUDA's do: the first is eager."""

    class Later:
        captures = Captures()

        def first(self, step: Call, _: torch.device) -> Captured:
            return Captured(step(), second=self.captures.first)

    model, ids, graphs = model_of("llama", packed=True), tiny_tokens(1, 12), Later()
    cache = StaticCache(model.config, max_cache_len=12)
    found = []
    with torch.no_grad(), decode_graph(model, graphs):
        for token in ids.split(1, dim=1):
            found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)
    assert (graphs.captures.graphs, graphs.captures.replays) == (1, 9)
    want = forced(model, ids, None)
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-5)


def test_what_fails_in_a_captured_token_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager token after half a recorded one would go into the wrong place of the cache."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 1)
    cache = StaticCache(model.config, max_cache_len=8)
    mlp, captures = model.model.layers[1].mlp, Captures()
    with torch.no_grad(), decode_graph(model, captures):
        model(input_ids=ids, past_key_values=cache, use_cache=True)

        def fail(_: Tensor) -> Tensor:
            raise RuntimeError("not enough memory")

        monkeypatch.setattr(mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="not enough memory"):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert int(cache.layers[0].cumulative_length) == 2


@pytest.mark.parametrize("length", [4, 12])
def test_windows_that_slide_or_do_not_yet(length: int) -> None:
    """Tokens are counted in Python too: what comes after replays finds them counted."""
    model, ids = make_model("gemma3"), tiny_tokens(1, 3)  # a window of 7
    captures = Captures()
    assert decodes_under_graph(model, 7)
    assert not decodes_under_graph(model, 8)
    want = generated(model, ids, None, max_new_tokens=length, min_new_tokens=length)
    got = generated(model, ids, captures, max_new_tokens=length, min_new_tokens=length)
    assert torch.equal(got, want)
    assert captures.replays > 0
