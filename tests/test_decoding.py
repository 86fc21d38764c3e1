"""Which calls of a model are captured, and replayed as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_model
from graph_cases import Captures, forced, model_of
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import AutoConfig, GemmaConfig, MistralConfig, StaticCache

from nowag_ext import decode_graph
from nowag_ext.decoding import decodes_under_graph, has_plain_cache
from nowag_ext.generate import generate
from nowag_ext.graphs import Call, Captured

NEW = 12
REPLAYED = NEW - 2  # the prompt gives a token, and one is captured


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
