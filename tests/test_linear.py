"""VQLinear and SparseLinear: forward, gradients, state, moves, refusals, torch.compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor, nn
from vq_cases import activations, random_vq

from nowag_ext import reference
from nowag_ext.linear import SparseLinear, VQLinear, kept_weights
from nowag_ext.prune import SparseWeight, prune
from nowag_ext.vq import VQWeight

NAMES = ("codes", "codebook", "row_norms", "col_norms")


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def vq_weight(in_features: int = 50, out_features: int = 70, seed: int = 0) -> VQWeight:
    vq = random_vq(out_features, in_features, 4, 8, seed)
    return VQWeight(*vq, shape=(out_features, in_features))


def vq_layer(
    in_features: int = 50, out_features: int = 70, bias: bool = True, seed: int = 0
) -> VQLinear:
    values = torch.randn(out_features, generator=torch.Generator().manual_seed(seed))
    return VQLinear.from_weight(
        vq_weight(in_features, out_features, seed), nn.Parameter(values) if bias else None
    )


def sparse_weight(pattern: str | None = None) -> SparseWeight:
    generator = torch.Generator().manual_seed(0)
    W, act_norms = torch.randn(70, 52, generator=generator), torch.rand(52, generator=generator)
    return prune(W, act_norms, pattern=pattern) if pattern else prune(W, act_norms, sparsity=0.5)


def expected(layer: VQLinear, x: Tensor) -> Tensor:
    return reference.vq_linear(x, *(getattr(layer, name) for name in NAMES), layer.bias)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_forward(tokens: int, bias: bool) -> None:
    layer = vq_layer(bias=bias)
    x = activations(tokens, 50, torch.float32)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-4)


def test_bias_follows_the_dtype_of_the_input() -> None:
    layer = vq_layer()
    x = activations(3, 50, torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packed_tensors_keep_their_dtypes(dtype: torch.dtype) -> None:
    layer = vq_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    for name in NAMES:
        assert_same_bits(getattr(layer, name), before[name])
    layer.float().half().bfloat16().double()
    for name in NAMES:
        assert_same_bits(getattr(layer, name), before[name])


def test_state_dict_is_the_canonical_form() -> None:
    layer = vq_layer()
    layer(torch.randn(1, 50))
    state = layer.state_dict()
    assert set(state) == {*NAMES, "bias"}
    other = VQLinear(50, 70, d=4, bits=2, bias=True)
    other.load_state_dict(state)
    x = torch.randn(5, 50)
    assert_same_bits(layer(x), other(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(clone: object) -> None:
    layer = vq_layer()
    other = clone(layer)  # type: ignore[operator]
    x = torch.randn(2, 50)
    assert_same_bits(layer(x), other(x))
    assert other.codes.data_ptr() != layer.codes.data_ptr()


def test_starts_on_meta() -> None:
    layer = VQLinear(50, 70, d=6, bits=2, bias=True, device="meta")
    assert layer(torch.empty(2, 3, 50, device="meta")).shape == (2, 3, 70)
    with pytest.raises(ValueError, match="codes is on the meta device"):
        layer.validate()
    layer.to(torch.bfloat16).to_empty(device="cpu")
    assert layer.codebook.dtype == torch.float16
    assert layer.codes.shape == (3, 9, 48)
    layer.load_state_dict(VQLinear(50, 70, d=6, bits=2, bias=True).state_dict())
    layer.validate()


def test_bias_keeps_requires_grad() -> None:
    weight = vq_weight()
    frozen = nn.Parameter(torch.randn(70), requires_grad=False)
    assert VQLinear.from_weight(weight, frozen).bias is frozen
    free = nn.Parameter(torch.randn(70))
    assert VQLinear.from_weight(weight, free).bias is free
    with pytest.raises(ValueError, match=r"bias must have shape \(70,\), not \(71,\)"):
        VQLinear.from_weight(weight, torch.randn(71))


def test_gradients_flow_to_input_and_bias() -> None:
    layer = vq_layer()
    x = activations(3, 50, torch.float32).requires_grad_()
    layer(x).sum().backward()
    weight = reference.vq_dequantize(*(getattr(layer, name) for name in NAMES), torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 50), rtol=1e-4, atol=1e-5)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((70,), 3.0))


@pytest.mark.parametrize("name", ["codebook", "row_norms", "col_norms"])
def test_validate_refuses_values_that_are_not_finite(name: str) -> None:
    layer = vq_layer()
    layer.validate()
    getattr(layer, name).view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be finite, but 1 values are NaN or inf"):
        layer.validate()


def test_validate_refuses_wrong_shapes_and_dtypes() -> None:
    layer = vq_layer()
    layer.codes = frozen(layer.codes[:, :-1].contiguous())
    with pytest.raises(ValueError, match=r"codes must be torch.uint8 of shape \(3, 13, 32\), not"):
        layer.validate()
    layer = vq_layer()
    layer.codebook = frozen(layer.codebook.float())
    with pytest.raises(ValueError, match=r"codebook must be torch.float16 of shape \(256, 4\)"):
        layer.validate()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d": 9, "bits": 1}, "d must be an integer from 1 to 8, not 9"),
        ({"d": 4, "bits": 5}, "d \\* bits must be from 1 to 16, not 4 \\* 5"),
        ({"d": 3, "bits": 0.5}, "d \\* bits must be an integer, not 3 \\* 0.5"),
        ({"d": 3, "bits": 0}, "d \\* bits must be from 1 to 16, not 3 \\* 0"),
    ],
)
def test_refuses_settings_outside_the_format(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VQLinear(50, 70, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_features and out_features must be positive"):
        VQLinear(0, 70, d=4, bits=2)


def test_refuses_inputs_it_cannot_take() -> None:
    layer = vq_layer()
    with pytest.raises(ValueError, match="x must have 50 features in its last dimension"):
        layer(torch.randn(3, 51))
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(TypeError, match=f"x must be .*torch.bfloat16, not {dtype}"):
            layer(torch.ones(3, 50, dtype=dtype))
    with pytest.raises(ValueError, match="x must be on cpu, not on meta"):
        layer(torch.empty(3, 50, device="meta"))


def test_fractional_bits() -> None:
    layer = VQLinear(50, 70, d=4, bits=2.5)
    assert layer.codebook.shape == (1024, 4)
    assert "d=4, bits=2.5" in repr(layer)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks(tokens: int, grad: bool) -> None:
    layer = vq_layer()
    model = nn.Sequential(layer, nn.SiLU(), vq_layer(70, 64, seed=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = activations(tokens, 50, torch.float32)
    inputs = [x.clone().requires_grad_(grad) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        got, want = compiled(inputs[0]), model(inputs[1])
    torch.testing.assert_close(got, want)
    if grad:
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "kept"),
    [(0.5, None, 50), (0.0, None, 100), (0.333, None, 67), (None, "2:4", 50), (None, "1:5", 20)],
)
def test_kept_weights(sparsity: float | None, pattern: str | None, kept: int) -> None:
    assert kept_weights(20, 5, sparsity, pattern) == kept


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "give either sparsity or pattern"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), not nan"),
        ({"pattern": "4:2"}, r"pattern must be \"N:M\" with 1 <= N <= M, not '4:2'"),
        ({"pattern": "2/4"}, r"pattern must be \"N:M\""),
        ({"pattern": "2:3"}, "M = 3 of pattern '2:3' must divide in_features 20"),
    ],
)
def test_sparse_refuses_settings(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SparseLinear(20, 5, **settings)  # type: ignore[arg-type]


def test_vq_weight_comes_back() -> None:
    weight = vq_weight()
    form = VQLinear.from_weight(weight).weight_form()
    assert (form.shape, form.d, form.bits) == (weight.shape, weight.d, weight.bits)
    for name, tensor in weight.tensors().items():
        assert form.tensors()[name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40])
def test_sparse_forward_and_gradients(tokens: int, pattern: str | None) -> None:
    weight = sparse_weight(pattern)
    layer = SparseLinear.from_weight(weight, nn.Parameter(torch.randn(70)))
    layer.validate()
    x = activations(tokens, 52, torch.float32).requires_grad_()
    dense = weight.dequantize()
    want = torch.nn.functional.linear(x.detach(), dense, layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=2e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=2e-4)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(tokens, 52), rtol=1e-4, atol=1e-4)


def test_sparse_state_and_form() -> None:
    weight = sparse_weight("2:4")
    layer = SparseLinear.from_weight(weight)
    assert set(layer.state_dict()) == {"bitmap", "values", "row_offsets"}
    assert layer.weight_form().values.data_ptr() == weight.values.data_ptr()
    assert layer.weight_form().pattern == "2:4"
    other = SparseLinear(52, 70, pattern="2:4")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 52)
    assert_same_bits(layer(x), other(x))
    other.bfloat16()
    assert other.values.dtype == torch.float32
    assert "pattern='2:4'" in repr(layer)
    assert "sparsity=0.5" in repr(SparseLinear.from_weight(sparse_weight()))
    assert SparseLinear(52, 70, sparsity=0.5).values.numel() == sparse_weight().values.numel()


def test_sparse_validate_refuses_what_kernels_must_not_trust() -> None:
    def broken(name: str, index: int, value: float) -> SparseLinear:
        layer = copy.deepcopy(SparseLinear.from_weight(sparse_weight()))
        getattr(layer, name).view(-1)[index] = value
        return layer

    with pytest.raises(ValueError, match="row_offsets must be the running popcount of bitmap"):
        broken("row_offsets", 3, 10**6).validate()
    with pytest.raises(ValueError, match="bitmap must not have bits set past in_features 52"):
        broken("bitmap", 7, 0x80).validate()
    with pytest.raises(ValueError, match="bitmap must not have bits set past in_features 52"):
        broken("bitmap", 6, 0xFF).validate()
    with pytest.raises(ValueError, match="values must be finite, but 1 values are NaN or inf"):
        broken("values", 5, float("inf")).validate()
    layer = SparseLinear.from_weight(sparse_weight())
    layer.values = frozen(layer.values[:-1])
    with pytest.raises(ValueError, match="values must hold the 1820 weights"):
        layer.validate()


@pytest.mark.parametrize("grad", [False, True])
def test_sparse_compiles_without_graph_breaks(grad: bool) -> None:
    layer = SparseLinear.from_weight(sparse_weight())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = activations(20, 52, torch.float32).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33])
def test_gradient_makes_no_difference_to_the_result(tokens: int) -> None:
    layer = vq_layer()
    x = activations(tokens, 50, torch.float32)
    with torch.no_grad():
        plain = layer(x)
    assert_same_bits(layer(x.requires_grad_()), plain)


@pytest.mark.parametrize("make", [vq_layer, lambda: SparseLinear.from_weight(sparse_weight())])
def test_unfit_inputs_are_refused(make: Callable[[], nn.Module]) -> None:
    layer = make()
    width = layer.in_features
    assert isinstance(width, int)
    for wrong in (width - 1, width + 1, 1):
        with pytest.raises(ValueError, match=rf"x must have {width} features in its last dim"):
            layer(torch.randn(2, wrong))
    with pytest.raises(ValueError, match=rf"x must have {width} features"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x must be on meta, not on cpu"):
        layer.to("meta")(torch.randn(2, width))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("make", [vq_layer, lambda: SparseLinear.from_weight(sparse_weight())])
def test_autocast(make: Callable[[], nn.Module], tokens: int) -> None:
    layer = make()
    x = torch.randn(tokens, int(layer.in_features), requires_grad=True)  # type: ignore[arg-type]
    want = layer(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert_same_bits(got, want)
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def sparse_layer() -> SparseLinear:
    return SparseLinear.from_weight(sparse_weight())


def lie(state: dict[str, Tensor], name: str, index: int, value: float) -> dict[str, Tensor]:
    state = {key: tensor.clone() for key, tensor in state.items()}
    state[name].view(-1)[index] = value
    return state


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_refuses_what_is_no_weight(strict: bool, assign: bool) -> None:
    x = torch.randn(3, 52)
    layer = sparse_layer()
    model, want = nn.Sequential(layer), layer(x)
    for name, index, value, sentence in (
        ("row_offsets", 3, 10**6, "row_offsets must be the running popcount"),
        ("bitmap", 7, 0x80, "bitmap must not have bits set past in_features"),
        ("values", 5, float("nan"), "values must be finite"),
    ):
        state = lie(model.state_dict(), f"0.{name}", index, value)
        with pytest.raises(RuntimeError, match=f"0: {sentence}"):
            model.load_state_dict(state, strict=strict, assign=assign)
        assert_same_bits(layer(x), want)
    state = model.state_dict()
    state["0.row_offsets"] = state["0.row_offsets"].long()
    with pytest.raises(RuntimeError, match=r"0: row_offsets must be torch.int32, not torch.int64"):
        model.load_state_dict(state, strict=strict, assign=assign)
    vq = vq_layer()
    with pytest.raises(RuntimeError, match="VQLinear: codebook must be finite"):
        vq.load_state_dict(lie(vq.state_dict(), "codebook", 0, float("inf")), strict, assign)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer.load_state_dict({**layer.state_dict(), "values": torch.zeros(3)}, strict, assign)
    layer.load_state_dict({"values": layer.values / 2}, strict=False)  # a part of it
    torch.testing.assert_close(layer(x), want / 2)


def test_no_way_into_a_layer_leads_out_of_its_operands() -> None:
    """Content is checked where it is given as a whole, and places again by the kernels."""
    weight = sparse_weight()
    moved = weight.row_offsets.clone()
    moved[3] += 10**6
    with pytest.raises(ValueError, match="row_offsets must be the running popcount"):
        SparseLinear.from_weight(
            SparseWeight(weight.bitmap, weight.values, moved, weight.shape, weight.pattern)
        )

    def edited() -> SparseLinear:
        layer = sparse_layer()
        layer.row_offsets[3] += 10**6
        return layer

    def set_anew() -> SparseLinear:
        layer = sparse_layer()
        layer.row_offsets = frozen(moved)
        return layer

    def data_replaced() -> SparseLinear:
        layer = sparse_layer()
        layer.row_offsets.data = moved
        return layer

    for make in (edited, set_anew, data_replaced):
        for layer in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
            for tokens in (1, 40):
                with pytest.raises(ValueError, match="row_offsets must ascend from 0 to"):
                    layer(torch.randn(tokens, 52))
    assert SparseLinear(52, 70, sparsity=0.5)(torch.randn(2, 52)).abs().sum() == 0
