"""Transforms of torch that nn.Linear obeys: torch.func's, forward mode, and compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_linear import sparse_weight, vq_weight
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from nowag_ext import SparseLinear, VQLinear, ops

Function = Callable[[Tensor], Tensor]


def pair(method: str, seed: int = 0) -> tuple[nn.Module, nn.Linear]:
    """A packed layer, and the same in dense form."""
    bias = nn.Parameter(torch.randn(70, generator=torch.Generator().manual_seed(seed)))
    weight = vq_weight(seed=seed) if method == "vq" else sparse_weight()
    layer = (VQLinear if method == "vq" else SparseLinear).from_weight(weight, bias)  # type: ignore[arg-type]
    dense = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        dense.weight.copy_(weight.dequantize())
        dense.bias.copy_(bias)
    return layer, dense


def inputs(layer: nn.Linear, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*leading, layer.in_features, generator=generator) / layer.in_features**0.5


def squares(layer: nn.Module) -> Function:
    return lambda x: layer(x).square().sum()


def of_bias(layer: nn.Module, x: Tensor) -> Function:
    return lambda bias: functional_call(layer, {"bias": bias}, (x,)).sin()


def forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, x.cos())).sin()
        return forward_ad.unpack_dual(y).tangent


def backward_of_vmap(layer: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    vmap(squares(layer))(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def gradient_penalty(layer: nn.Module, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), (leaf, layer.bias))


def assert_near(got: Any, want: Any) -> None:
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_near(one, other)
    else:
        scale = float(want.detach().abs().max())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * scale)


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda f, x: grad(squares(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones(*x.shape[:-1], f.out_features)),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "jacrev": lambda f, x: jacrev(f)(x[0]),
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
    "hessian": lambda f, x: hessian(squares(f))(x[0]),
    "reverse over reverse": lambda f, x: jacrev(jacrev(lambda x: f(x).sin().sum()))(x[0]),
    "forward over forward": lambda f, x: jacfwd(jacfwd(lambda x: f(x).sin().sum()))(x[0]),
    "reverse over forward": lambda f, x: jacrev(jacfwd(lambda x: f(x).sin().sum()))(x[0]),
    "vmap": lambda f, x: vmap(f)(x),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(x[None]),
    "vmap, batch last": lambda f, x: vmap(f, in_dims=1, out_dims=1)(x.T),
    "gradients by sample": lambda f, x: vmap(grad(squares(f)))(x),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(x).square().sum())(x),
    "jacrev of bias": lambda f, x: jacrev(of_bias(f, x))(f.bias),
    "jacfwd of bias": lambda f, x: jacfwd(of_bias(f, x[0]))(f.bias),
    "hessian of bias": lambda f, x: hessian(lambda b: of_bias(f, x)(b).sum())(f.bias),
    "vmap over biases": lambda f, x: vmap(of_bias(f, x))(torch.stack([f.bias, 2 * f.bias])),
    "forward mode": forward_mode,
    "backward of vmap": backward_of_vmap,
    "gradient penalty": gradient_penalty,
    "batch of gradients": lambda f, x: torch.autograd.grad(
        f(leaf := x.clone().requires_grad_()),
        leaf,
        torch.eye(70)[:, None].expand(70, len(x), 70),
        is_grads_batched=True,
    ),
    "torch.autograd.functional": lambda f, x: torch.autograd.functional.jacobian(
        f, x[0], vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("method", ["vq", "prune"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_as_nn_linear(name: str, method: str, tokens: int) -> None:
    layer, dense = pair(method)
    x = inputs(dense, tokens)
    got, want = TRANSFORMS[name](layer, x), TRANSFORMS[name](dense, x)
    assert_near(got, want)


@pytest.mark.parametrize("method", ["vq", "prune"])
@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "vmap", "gradients by sample"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled(name: str, method: str) -> None:
    layer, dense = pair(method)
    x = inputs(dense, 3)
    torch._dynamo.reset()
    transform = TRANSFORMS[name]
    got = torch.compile(lambda x: transform(layer, x), backend="aot_eager", fullgraph=True)(x)
    assert_near(got, transform(dense, x))


@pytest.mark.parametrize("method", ["vq", "prune"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, method: str) -> None:
    layer, dense = pair(method)
    x = inputs(dense, 5).to(dtype)
    got = vmap(grad(squares(layer)))(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, vmap(grad(squares(dense.to(dtype))))(x), rtol=0.05, atol=2.0)


@pytest.mark.parametrize("method", ["vq", "prune"])
def test_autocast_inside_a_transform(method: str) -> None:
    layer, _ = pair(method)
    x = torch.randn(4, layer.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = vmap(grad(lambda x: layer(x).float().sum()))(x)
        assert vmap(layer)(x).dtype == torch.bfloat16
    assert got.dtype == torch.float32


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_layers(dim: int) -> None:
    """An ensemble, whose weights differ."""
    layers = [pair("vq", seed)[0] for seed in range(3)]
    x = torch.randn(2, 50)
    parameters, buffers = stack_module_state(layers)
    parameters = {name: tensor.movedim(0, dim) for name, tensor in parameters.items()}
    got = vmap(lambda p: functional_call(layers[0], (p, buffers), (x,)), in_dims=dim)(parameters)
    torch.testing.assert_close(got, torch.stack([layer(x) for layer in layers]))


def test_ops_of_few_tokens_are_mapped_without_a_loop() -> None:
    layer, dense = pair("vq")
    packed = (layer.codes, layer.codebook, layer.row_norms, layer.col_norms)
    x = inputs(dense, 16, 3)  # 48 tokens in all, 3 at a time
    torch.testing.assert_close(
        vmap(lambda x: ops.vq_linear(x, *packed))(x), ops.vq_linear(x, *packed)
    )


@pytest.mark.parametrize(
    ("method", "name"), [("vq", "codebook"), ("vq", "row_norms"), ("prune", "values")]
)
def test_the_weight_is_constant(method: str, name: str) -> None:
    layer, dense = pair(method)
    x = inputs(dense, 3)
    parameter = getattr(layer, name)
    with pytest.raises(NotImplementedError, match=r"the packed weight .* is constant"):
        grad(lambda p: functional_call(layer, {name: p}, (x,)).sum())(parameter)
    with pytest.raises(NotImplementedError, match=r"the packed weight .* is constant"):
        jvp(lambda p: functional_call(layer, {name: p}, (x,)), (parameter,), (parameter,))
    parameter.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"the packed weight .* is constant"):
        layer(x).sum().backward()
