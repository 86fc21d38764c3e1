"""Generation under a graph, on a CPU: captures that record a token's operations and replay them.

As a CUDA graph does, a replay runs what was recorded and nothing of Python, on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoConfig, GemmaConfig, MistralConfig, StaticCache

from nowag_ext import compress_model, decode_graph, decoding
from nowag_ext.decoding import decodes_under_graph, has_plain_cache
from nowag_ext.generate import generate

NEW = 12


class Recorder(TorchDispatchMode):
    """The operations of a step, which is undone: each with its operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # what was written to, and its old content
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = given.untyped_storage()
                if storage._cdata not in self.kept:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.kept[storage._cdata] = (whole, whole.clone())
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tree_flatten(result)[0]))
        return result

    def undo(self) -> None:
        for whole, content in self.kept.values():
            whole.copy_(content)

    def replay(self, outputs: list[Tensor]) -> None:
        now: dict[int, Any] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value)

        for func, args, kwargs, results in self.operations:
            again = tree_flatten(func(*tree_map(current, args), **tree_map(current, kwargs)))[0]
            now.update((id(old), new) for old, new in zip(results, again, strict=True))
        for output in outputs:
            output.copy_(current(output))


class Captures:
    """Counts graphs and replays, which are recorded."""

    def __init__(self, *, waits: bool = False, fails: bool = False) -> None:
        self.waits, self.fails = waits, fails
        self.graphs = self.replays = 0
        self.recorders: list[Any] = []  # they hold what ids stand for

    def rehearse(self, step: Callable[[], Any], _: torch.device) -> tuple[Any, str | None]:
        return step(), "model.py:7 waits for the device" if self.waits else None

    def capture(
        self, step: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        assert device == torch.device("cpu")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graphs += 1
        with Recorder() as recorder:
            output = step()
        recorder.undo()
        self.recorders.append(recorder)
        output.logits.fill_(float("nan"))

        def replay() -> None:
            self.replays += 1
            recorder.replay([output.logits])

        return replay, output


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
    assert captures.replays == 2 * (NEW - 2)  # the prompt gives one token, another is eager
    assert "forward" not in vars(model)


def test_draws_what_is_drawn_without() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(1, 5)
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    want = generated(model, ids, None, **drawn)
    assert torch.equal(generated(model, ids, captures, **drawn), want)
    assert captures.replays == NEW - 2


def test_padded_prompts() -> None:
    model, captures, ids = model_of("llama", packed=True), Captures(), tiny_tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = generated(model, ids, None, attention_mask=mask)
    assert torch.equal(generated(model, ids, captures, attention_mask=mask), want)
    assert captures.replays == NEW - 2


def test_generate_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captures = model_of("llama", packed=True), Captures()
    model.generation_config.eos_token_id = None

    class Tokenizer:
        pad_token_id = 0

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    ids = tiny_tokens(1, 5)
    want = generate(model, Tokenizer(), ids, max_new_tokens=NEW)
    monkeypatch.setattr(decoding, "CudaGraphs", lambda: captures)
    monkeypatch.setattr("nowag_ext.generate.decodes_under_graph", lambda _: True)
    shown: list[str] = []
    got = generate(model, Tokenizer(), ids, max_new_tokens=NEW, show=shown.append)
    assert (got.text, got.tokens) == (want.text, NEW)
    assert "".join(shown).split() == want.text.split()
    assert captures.replays == NEW - 2


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
    assert captures.replays == NEW - 2
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other)
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad(), decode_graph(model, captures):
        model(ids, past_key_values=cache, use_cache=True)
        logits = [
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
            for _ in range(4)
        ]
    assert captures.replays == NEW + 1
    assert all(not torch.equal(one, logits[-1]) for one in logits[:-1])
    with pytest.warns(UserWarning, match="hidden_states is returned, which later tokens"):
        got = generated(model, ids, captures, output_hidden_states=True, **more)
    assert captures.replays == NEW + 1
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
    assert not decodes_under_graph(tiny_model("llama"))  # on a CPU
    assert all(has_plain_cache(tiny_model(architecture).config) for architecture in ARCHITECTURES)
    assert has_plain_cache(GemmaConfig())
    assert not has_plain_cache(MistralConfig(sliding_window=64))
    assert not has_plain_cache(AutoConfig.for_model("mamba"))
