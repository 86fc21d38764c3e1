"""Any order of the verbs that PyTorch and transformers users know: outputs stay the dense export's,
and what is packed keeps its bits."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_linear import vq_layer
from tiny_models import logits, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn

import nowag_ext
from nowag_ext import SparseLinear, compress_model, prune
from nowag_ext.packed import PackedModule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def small_net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    W, norms = torch.randn(40, 70, generator=generator), torch.ones(70)
    return nn.Sequential(
        vq_layer(50, 70),
        SparseLinear.from_weight(prune(W, norms), torch.zeros(40)),
        SparseLinear.from_weight(
            prune(torch.randn(30, 40, generator=generator), norms[:40], pattern="2:4")
        ),
    )


def packed_bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": tensor.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for own, tensor in module.packed_parameters().items()
    }


def dense_export(net: nn.Sequential) -> list[tuple[Tensor, Tensor | None]]:
    """Weights and biases of the layers, in float64."""
    return [
        (
            layer.weight_form().dequantize().double(),
            None if layer.bias is None else layer.bias.detach().double(),
        )
        for layer in net
    ]


def through(layers: list[tuple[Tensor, Tensor | None]], x: Tensor) -> Tensor:
    for weight, bias in layers:
        x = nn.functional.linear(x, weight, bias)
    return x


class Layers(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.net = small_net()
        self.bits = packed_bits(self.net)
        self.dense = dense_export(self.net)
        self.dtype = torch.float32  # of biases and inputs
        self.worst = torch.float32  # that biases have been through
        self.compiled: Any = None

    def replace(self, net: Any) -> None:
        self.net, self.compiled = net, None

    @rule(dtype=st.sampled_from(DTYPES))
    def to(self, dtype: torch.dtype) -> None:
        self.net.to(dtype)
        self.dtype = dtype
        self.worst = max(self.worst, dtype, key=TOLERANCE.__getitem__)

    @rule()
    def through_meta(self) -> None:
        state = self.net.state_dict()
        empty = copy.deepcopy(self.net).to("meta")
        empty.load_state_dict(state, assign=True)
        self.replace(empty)

    @rule()
    def deepcopy(self) -> None:
        self.replace(copy.deepcopy(self.net))

    @rule()
    def pickle(self) -> None:
        self.replace(pickle.loads(pickle.dumps(self.net)))

    @rule()
    def save_and_load_module(self) -> None:
        file = io.BytesIO()
        torch.save(self.net, file)
        file.seek(0)
        self.replace(torch.load(file, weights_only=False))

    @rule(assign=st.booleans())
    def save_and_load_state(self, assign: bool) -> None:
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        file.seek(0)
        other = small_net().to(self.dtype)
        other.load_state_dict(torch.load(file), assign=assign)
        self.replace(other)

    @rule()
    def from_forms(self) -> None:
        self.replace(
            nn.Sequential(*(type(m).from_weight(m.weight_form(), m.bias) for m in self.net))
        )

    @rule()
    def share_memory(self) -> None:
        self.net.share_memory()

    @rule(wanted=st.booleans())
    def gradients_of_biases(self, wanted: bool) -> None:
        for layer in self.net:
            if layer.bias is not None and not layer.bias.is_inference():
                layer.bias.requires_grad_(wanted)

    @rule()
    def made_in_inference_mode(self) -> None:
        """Such tensors have no gradient, here as in nn.Linear."""
        with torch.inference_mode():
            self.replace(copy.deepcopy(self.net).requires_grad_(False))

    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.net.train(train)

    @rule()
    def replicate(self) -> None:
        """As DataParallel does, whose replicas hold tensors in place of parameters."""
        replicas = nn.Sequential(*(layer._replicate_for_data_parallel() for layer in self.net))
        for replica, layer in zip(replicas, self.net, strict=True):
            for name, parameter in layer._parameters.items():
                replica._parameters[name] = None if parameter is None else parameter.detach()
        self.check(replicas)

    @precondition(lambda self: self.compiled is None)
    @rule()
    def compile(self) -> None:
        torch._dynamo.reset()
        self.compiled = torch.compile(self.net, backend="eager")

    @rule(tokens=st.sampled_from([1, 16, 40]))
    def threads(self, tokens: int) -> None:
        x = self.inputs(tokens)
        want = self.net(x)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: self.net(x), range(8)):
                assert torch.equal(got, want)

    @rule(dtype=st.sampled_from(DTYPES), inference=st.booleans(), tokens=st.sampled_from([1, 40]))
    def call_under_defaults(self, dtype: torch.dtype, inference: bool, tokens: int) -> None:
        x = self.inputs(tokens)
        with defaults(dtype), torch.inference_mode(inference):
            self.check(self.net, x)

    @rule(dtype=st.sampled_from(DTYPES[1:]))
    def autocast(self, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype):
            y = self.net(self.inputs(5))
        assert y.dtype == dtype
        self.compare(y, self.inputs(5), dtype)

    @rule()
    def backward(self) -> None:
        if any(p.is_inference() for p in self.net.parameters()):
            return
        x = self.inputs(5).requires_grad_()
        self.net(x).sum().backward()
        want = torch.ones(5, 30, dtype=torch.float64)
        for weight, _ in reversed(self.dense):
            want = want @ weight
        assert x.grad is not None
        assert_near(x.grad, want, self.dtype)

    def inputs(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, 50, generator=generator).to(self.dtype)

    def check(self, net: Any, x: Tensor | None = None) -> None:
        x = self.inputs(3) if x is None else x
        y = net(x)
        assert y.dtype == self.dtype
        self.compare(y, x, self.worst)

    def compare(self, y: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        worst = max(self.worst, dtype, key=TOLERANCE.__getitem__)
        assert_near(y, through(self.dense, x.double()), worst)

    @invariant()
    def same_as_dense(self) -> None:
        self.check(self.net)
        if self.compiled is not None:
            self.check(self.compiled)

    @invariant()
    def same_bits(self) -> None:
        now = packed_bits(self.net)
        assert all(torch.equal(tensor, now[name]) for name, tensor in self.bits.items())
        for layer in self.net:
            layer.validate()


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = (got.detach().double() - want).norm() / want.norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2g}"


@contextlib.contextmanager
def defaults(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


class Models(RuleBasedStateMachine):
    """Of these no verb changes a bit of the logits but a change of dtype, and a dense export."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saved = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(method=st.sampled_from(["vq", "prune", "vq with a head"]))
    def start(self, method: str) -> None:
        self.model = tiny_model()
        vq: dict[str, Any] = {} if method == "prune" else {"d": 4, "bits": 1.5, "iters": 2}
        if method == "vq with a head":
            nowag_ext.compress(self.model, tiny_tokens(), head={"d": 2, "bits": 3}, **vq)
        else:
            compress_model(self.model, random_act_norms(self.model), method, **vq)
        self.bits, self.logits = packed_bits(self.model), logits(self.model)

    def new_path(self) -> Path:
        self.saved += 1
        return self.folder / str(self.saved)

    @rule()
    def save_and_load(self) -> None:
        path, dtype = self.new_path(), self.model.dtype
        nowag_ext.save_compressed(self.model, None, path)
        self.replace(nowag_ext.load(path, dtype=dtype))

    def replace(self, model: Any) -> None:
        """Takes a model that was loaded: its rotary frequencies are float32's again, whatever
        ``to`` has made of them, as a dense model's are."""
        same = torch.equal(*(one.model.rotary_emb.inv_freq for one in (self.model, model)))
        self.model = model
        if not same:
            before, self.logits = self.logits, logits(model)
            assert (self.logits - before).norm() <= 0.1 * before.norm()

    @rule()
    def save_and_go_on(self) -> None:
        self.model.save_pretrained(self.new_path())

    @rule()
    def save_and_load_in_inference_mode(self) -> None:
        path = self.new_path()
        with torch.inference_mode():
            nowag_ext.save_compressed(self.model, None, path)
            self.replace(nowag_ext.load(path, dtype=self.model.dtype))

    @rule(dtype=st.sampled_from(DTYPES[:2]))
    def to(self, dtype: torch.dtype) -> None:
        before = self.logits
        self.model.to(dtype)
        self.logits = logits(self.model)
        assert (self.logits - before).norm() <= 0.1 * before.norm()

    @rule()
    def deepcopy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    @rule(assign=st.booleans())
    def reload_state(self, assign: bool) -> None:
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()), assign=assign)

    @rule(dtype=st.sampled_from([None, torch.float32]))
    def dense_copy(self, dtype: torch.dtype | None) -> None:
        dense = copy.deepcopy(self.model).dequantize(dtype=dtype)
        assert not any(isinstance(module, PackedModule) for module in dense.modules())
        got = logits(dense)
        limit = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        assert (got - self.logits).norm() <= limit * got.norm()
        path = self.new_path()
        nowag_ext.save_dense(copy.deepcopy(self.model), None, path)
        again = type(dense).from_pretrained(path, dtype=self.model.dtype)
        assert (logits(again) - self.logits).norm() <= limit * got.norm()

    @rule()
    def generate(self) -> None:
        ids = tiny_tokens(1, 5)
        out = self.model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert out.shape == (1, 7)

    @invariant()
    def same(self) -> None:
        assert torch.equal(logits(self.model), self.logits)
        now = packed_bits(self.model)
        assert all(torch.equal(tensor, now[name]) for name, tensor in self.bits.items())


TestLayers = Layers.TestCase
TestLayers.settings = settings(max_examples=10, stateful_step_count=12)
TestModels = Models.TestCase
TestModels.settings = settings(max_examples=4, stateful_step_count=6)


def _call(net: nn.Sequential, x: Tensor, out: Any) -> None:
    out.put([net(x[:tokens]).detach().numpy() for tokens in (1, 16)])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_another_process(method: str) -> None:
    """Also where threads have run before the fork, which libgomp's do not outlive."""
    net, x = small_net(), torch.randn(16, 50)
    want = [net(x[:tokens]).detach() for tokens in (1, 16)]
    context = multiprocessing.get_context(method)
    out = context.Queue()
    process = context.Process(target=_call, args=(net, x, out))
    process.start()
    try:
        got = out.get(timeout=60)
    finally:
        process.kill()
        process.join()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(torch.from_numpy(one), other)
