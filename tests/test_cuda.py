"""Every operation on a CUDA device against the same operation on the CPU. Needs a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import assert_same_bits, assert_within
from test_kmeans_feedback import problem as feedback_problem
from tiny_models import random_act_norms, tiny_model, tiny_tokens
from torch import Tensor
from vq_cases import activations, random_vq

import nowag_ext
from nowag_ext import ops, prune, vq_compress
from nowag_ext.cuda_graphs import CudaGraphs
from nowag_ext.decoding import decodes_under_graph
from nowag_ext.graphs import Captured
from nowag_ext.linear import SparseLinear, VQLinear
from nowag_ext.ops import registry

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(registry._cuda is None, reason="nowag_ext was built without CUDA"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_cuda(argument: object) -> object:
    """The argument with its tensors copied to the device."""
    if isinstance(argument, Tensor):
        return argument.to(CUDA)
    if isinstance(argument, list):
        return [on_cuda(item) for item in argument]
    return argument


def assert_op_agrees(op: Callable[..., object], *arguments: object) -> None:
    """Results and written arguments are the CPU's bits."""
    moved = [on_cuda(argument) for argument in arguments]
    got, want = op(*moved), op(*arguments)
    for result, expected in zip(_tensors(got), _tensors(want), strict=True):
        assert_same_bits(result, expected)
    for argument, expected in zip(_tensors(moved), _tensors(list(arguments)), strict=True):
        assert_same_bits(argument, expected)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (65, 131), (1000, 777), (576, 1536)])
def test_normalize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_op_agrees(ops.normalize, randn(*shape).to(dtype))


def points(rows: int, cols: int, d: int) -> tuple[Tensor, Tensor]:
    h = torch.zeros(ops.code_positions(cols, d) * d)
    h[:cols] = randn(cols, seed=1).square()
    h[: max(1, cols // 100)] *= 50  # the few channels that matter most
    return randn(rows, cols) / 10, h


@pytest.mark.parametrize(
    ("rows", "cols", "d", "entries"),
    [(70, 13, 1, 2), (1025, 100, 2, 64), (600, 260, 4, 256), (2000, 300, 6, 4096),
     (130, 320, 8, 65536), (700, 90, 5, 1000), (1030, 130, 3, 2048), (64, 70, 7, 512)],
)  # fmt: skip
def test_kmeans_iterations(rows: int, cols: int, d: int, entries: int) -> None:
    w, h = points(rows, cols, d)
    scale = ops.kmeans_scale(float(rows * h.double().sum()))
    codebook = randn(entries, d, seed=2) / 10
    codes = torch.zeros(rows, ops.code_positions(cols, d), dtype=torch.uint16)
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64)
    for iteration in range(4):
        assert_op_agrees(
            ops.kmeans_assign, [w], [h], [codebook], [codes], [sums], scale, iteration > 0
        )
        assert_op_agrees(ops.kmeans_update, sums, scale, codebook)
    assert_op_agrees(ops.kmeans_errors, w, h, codebook, codes)
    assert_op_agrees(ops.kmeans_spread, w, h, codebook, codes, scale)
    assert_op_agrees(ops.kmeans_merge_costs, sums, codebook, scale, torch.arange(0, entries, 3))
    assert_op_agrees(ops.kmeans_energy, w, h, d)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize(("d", "entries"), [(4, 256), (6, 4096)])
def test_kmeans_seed(init: str, d: int, entries: int) -> None:
    one, two = points(900, 300, d), points(33, 130, d)
    assert_op_agrees(ops.kmeans_seed, [one[0], two[0]], [one[1], two[1]], entries, d, init, 7)


def saliency_case(kind: str, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    w, h = randn(rows, cols), randn(cols, seed=1).square()
    if kind == "ties":
        w, h = (2 * w).round(), torch.ones(cols)
    elif kind == "many zeros":
        w[w < 0.5] = 0
    elif kind == "zeros":
        w = torch.zeros_like(w)
    elif kind == "one channel":
        h[cols // 2] = 1e30
    elif kind == "a crowd":  # more candidates in a few blocks than they gather
        h = torch.ones(cols)
        w.view(-1)[: w.numel() // 50] = 0.67 + torch.arange(w.numel() // 50) * 1e-8
    return w, h


@pytest.mark.parametrize(
    "kind", ["random", "ties", "many zeros", "zeros", "one channel", "a crowd"]
)
@pytest.mark.parametrize("shape", [(1, 70), (700, 1001), (4096, 512), (2048, 11008)])
def test_prune_select(shape: tuple[int, int], kind: str) -> None:
    w, h = saliency_case(kind, *shape)
    for n_prune in (0, 1, w.numel() // 2, w.numel() - 1, w.numel()):
        assert_op_agrees(ops.prune_select, w, h, n_prune)
    bitmap = ops.prune_select(w, h, w.numel() // 2)
    assert_op_agrees(ops.prune_objective, w, h, bitmap)


def test_prune_select_of_rows_at_an_odd_address() -> None:
    w, h = randn(300, 512), randn(512, seed=1).square()
    odd = torch.cat([torch.zeros(1), w.view(-1)]).to(CUDA)[1:].view(300, 512)
    got = ops.prune_select(odd, h.to(CUDA), 70_000)
    assert_same_bits(got, ops.prune_select(w, h, 70_000))


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_prune_select_in_a_graph(kind: str) -> None:
    w, h = saliency_case(kind, 1024, 2048)
    device_w, device_h = w.to(CUDA), h.to(CUDA)
    ops.prune_select(device_w, device_h, 1_000_000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bitmap = ops.prune_select(device_w, device_h, 1_000_000)
    for _ in range(20):
        bitmap.zero_()
        graph.replay()
        assert_same_bits(bitmap, ops.prune_select(w, h, 1_000_000))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (16, 32), (5, 12)])
def test_prune_select_nm(n: int, m: int) -> None:
    assert_op_agrees(ops.prune_select_nm, randn(300, 96), randn(96, seed=1).square(), n, m)


@pytest.mark.parametrize(
    ("rows", "positions", "d", "code_bits"),
    [(1, 1, 1, 1), (300, 5, 4, 8), (700, 6, 6, 12), (33, 3, 8, 13), (5000, 2, 3, 6)],
)
def test_kmeans_feedback(rows: int, positions: int, d: int, code_bits: int) -> None:
    operands = feedback_problem(rows, positions, d, code_bits)
    codes = torch.zeros(rows, positions, dtype=torch.uint16)
    sums = torch.zeros(2**code_bits, ops.feedback_sums_columns(d), dtype=torch.int64)
    assert_op_agrees(ops.kmeans_feedback, *operands, codes, 2.0**30, sums)


@pytest.mark.parametrize(
    "settings",
    [{"d": 4, "bits": 1.5}, {"method": "prune", "sparsity": 0.5}],
    ids=["vq", "prune"],
)
def test_block_by_block(settings: dict[str, Any]) -> None:
    """On the device as on the CPU, but for how torch's matrix products round."""
    tokens, losses = tiny_tokens(4, 24), []
    for device in (torch.device("cpu"), CUDA):
        model, dense = tiny_model("llama").to(device), tiny_model("llama").to(device)
        nowag_ext.compress(model, tokens, **settings)
        assert {parameter.device.type for parameter in model.parameters()} == {device.type}
        with torch.no_grad():
            logits = (model(tokens.to(device)).logits, dense(tokens.to(device)).logits)
        losses.append(float((logits[0] - logits[1]).square().mean()))
    assert abs(losses[1] - losses[0]) < 0.1 * losses[0]


@pytest.mark.parametrize("code_bits", range(1, 17))
def test_pack_codes(code_bits: int) -> None:
    codes = torch.randint(0, 2**code_bits, (77, 300)).to(torch.uint16)
    assert_op_agrees(ops.pack_codes, codes, code_bits)
    assert_op_agrees(ops.unpack_codes, ops.pack_codes(codes, code_bits), 77)


def test_pack_codes_refuses_a_code_that_does_not_fit() -> None:
    codes = torch.full((3, 3), 64).to(torch.uint16).to(CUDA)
    with pytest.raises(ValueError, match="code 64 does not fit into 6 bits"):
        ops.pack_codes(codes, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (3, 9), (8, 16), (1, 2)])
@pytest.mark.parametrize("cols", [700, 1064])  # the second of whole pieces of 16 bytes
def test_vq_dequantize(cols: int, d: int, code_bits: int, dtype: torch.dtype) -> None:
    assert_op_agrees(ops.vq_dequantize, *random_vq(133, cols, d, code_bits), dtype)


@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (4, 12), (2, 8), (5, 11), (1, 4)])
def test_vq_dequantize_of_a_large_layer(d: int, code_bits: int) -> None:
    """More tiles than blocks, several strips of columns."""
    assert_op_agrees(ops.vq_dequantize, *random_vq(11008, 1528, d, code_bits), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (3, 9), (8, 16), (1, 2), (2, 8)])
def test_vq_gather(d: int, code_bits: int, dtype: torch.dtype) -> None:
    vq, indices = random_vq(133, 700, d, code_bits), torch.tensor([[132, 0, 32], [31, 132, 64]])
    assert_op_agrees(ops.vq_gather, indices, *vq, dtype)
    assert_op_agrees(ops.vq_gather, indices.int().t(), *vq, dtype)
    assert_op_agrees(ops.vq_gather, indices[:0], *vq, dtype)
    outside = torch.tensor([-1, 133, -(2**63), 2**63 - 1])
    got = ops.vq_gather(outside.to(CUDA), *(tensor.to(CUDA) for tensor in vq), dtype)
    assert_same_bits(got, ops.vq_gather(outside.clamp(0, 132), *vq, dtype))


def test_vq_gather_of_many_rows() -> None:
    indices = torch.randint(0, 200, (70_000,))  # more than a grid has blocks along y
    assert_op_agrees(ops.vq_gather, indices, *random_vq(200, 30, 4, 8), torch.bfloat16)


def test_refuses_bytes_at_an_odd_address() -> None:
    def odd(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.view(-1)]).to(CUDA)[1:].view(tensor.shape)

    codes, *rest = random_vq(64, 96, 6, 12)
    rest = [tensor.to(CUDA) for tensor in rest]
    x = activations(1, 96, torch.float16).to(CUDA)
    for call in (
        lambda: ops.unpack_codes(odd(codes), 64),
        lambda: ops.vq_gemv(x, odd(codes), *rest),
        lambda: ops.vq_dequantize(odd(codes), *rest, torch.float32),
        lambda: ops.vq_gather(torch.tensor([5]).to(CUDA), odd(codes), *rest, torch.float32),
        lambda: ops.sparse_offsets(odd(torch.zeros(64, 16, dtype=torch.uint8)), 96),
    ):
        with pytest.raises(ValueError, match="must start at a multiple of 16 bytes"):
            call()
    assert_same_bits(  # a slice of whole tiles
        ops.unpack_codes(codes.to(CUDA)[1:], 32), ops.unpack_codes(codes, 64)[32:]
    )


# Weights from which on torch multiplies them in double on the device: a CPU takes seconds. Smaller
# ones stay on the CPU, so that sanitizers see no kernels but ours.
LARGE = 1 << 22
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_within_bound(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relative: float = 8e-6
) -> None:
    """The error bound of vq_gemv.h and sparse_gemv.h, with one rounding to the output's dtype."""
    epsilon, device = EPSILON[got.dtype], CUDA if weight.numel() > LARGE else torch.device("cpu")
    got, x, weight = (tensor.double().to(device) for tensor in (got, x, weight))
    want = x @ weight.T + (0 if bias is None else bias.double().to(device))
    bound = relative * (x.abs() @ weight.abs().T) + 1e-7
    assert_within(got, want, bound + epsilon * want.abs())


def bound_of(x: Tensor, d: int, code_bits: int) -> float:
    """The relative term; of lookup of float16, its absolute one is below the slack."""
    pairs = (d, code_bits, len(x)) == (6, 12, 2) and x.dtype != torch.float32
    return 8e-6 + (5e-4 if pairs else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (4, 12), (3, 9), (8, 16)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (4096, 4096), (576, 1537), (9000, 1100)])
def test_vq_gemv(rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype) -> None:
    vq = [tensor.to(CUDA) for tensor in random_vq(rows, cols, d, code_bits)]
    weight = ops.vq_dequantize(*vq, torch.float32)
    x = activations(16, cols, dtype).to(CUDA)
    bias = randn(rows, seed=3).to(dtype).to(CUDA)
    first: dict[int, Tensor] = {}
    for tokens in (1, 2, 3, 5, 8, 9, 16):
        y = ops.vq_gemv(x[:tokens], *vq, bias)
        assert_within_bound(y, x[:tokens], weight, bias, bound_of(x[:tokens], d, code_bits))
        # 1 token, 2, 3 to 8 and 9 to 16 may have other bits (vq_gemv.h).
        others = next(most for most in (1, 2, 8, 16) if tokens <= most)
        assert_same_bits(y[:1], first.setdefault(others, y[:1]))
        if tokens == 2:
            assert_same_bits(y, ops.vq_gemv(x[:2].flip(0), *vq, bias).flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (4, 12), (3, 9)])
@pytest.mark.parametrize("rows", [[300, 33, 1], [4096, 1024, 1024], [11008, 11008], [64] * 8])
def test_vq_gemv_group(d: int, code_bits: int, rows: list[int], dtype: torch.dtype) -> None:
    """Also in a graph, on two inputs in turn."""
    cols = 4096 if rows[0] > 1000 else 803
    vqs = [[*random_vq(height, cols, d, code_bits, seed=i)] for i, height in enumerate(rows)]
    vqs = [[tensor.to(CUDA) for tensor in vq] for vq in vqs]
    for vq in vqs[1:]:
        vq[1] = vqs[0][1]
    lists = [list(each) for each in zip(*vqs, strict=True)]
    biases = [randn(r, seed=9).to(dtype).to(CUDA) if i % 2 else None for i, r in enumerate(rows)]
    weights = [ops.vq_dequantize(*vq, torch.float32) for vq in vqs]
    for tokens in (1, 2, 8, 11):
        given = [activations(tokens, cols, dtype, seed=seed).to(CUDA) for seed in (1, 2)]
        x = given[0].clone()
        wanted = []
        for one in given:
            wanted.append(ops.vq_gemv_group(one, *lists, biases))
            for y, weight, bias in zip(wanted[-1], weights, biases, strict=True):
                assert_within_bound(y, one, weight, bias, bound_of(one, d, code_bits))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = ops.vq_gemv_group(x, *lists, biases)
        for turn in range(6):
            x.copy_(given[turn % 2])
            for y in outputs:
                y.fill_(float("nan"))
            graph.replay()
            for y, want in zip(outputs, wanted[turn % 2], strict=True):
                assert_same_bits(y, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (4, 12), (3, 9)])
@pytest.mark.parametrize(("rows", "cols"), [(70, 401), (4096, 4096)])
def test_vq_linear_of_many_tokens(
    rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    """By tensor cores up to 128 tokens, beyond by dense tiles, which are rounded to the dtype."""
    vq = [tensor.to(CUDA) for tensor in random_vq(rows, cols, d, code_bits)]
    weight = ops.vq_dequantize(*vq, torch.float32).double()
    x = activations(512, cols, dtype).to(CUDA).requires_grad_()
    bias = randn(rows, seed=3).to(dtype).to(CUDA)
    first: Tensor | None = None
    for tokens in (17, 33, 64, 65, 128, 129, 512):
        y = ops.vq_linear(x[:tokens], *vq, bias)
        want = x[:tokens].double() @ weight.T + bias.double()
        error = (y.double() - want).norm() / want.norm()
        assert error <= 2 * EPSILON[dtype], (tokens, error)
        if 17 <= tokens <= 64 and d != 3:
            first = y[:17] if first is None else first
            assert_same_bits(y[:17], first)
    y.sum().backward()
    want = weight.sum(0).expand(512, cols)
    assert x.grad is not None
    assert (x.grad.double() - want).norm() <= 2 * EPSILON[dtype] * want.norm()


@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8)])
def test_vq_linear_of_64_tokens_that_are_not_finite_or_zero(d: int, code_bits: int) -> None:
    vq = [tensor.to(CUDA) for tensor in random_vq(512, 1024, d, code_bits)]
    x = activations(64, 1024, torch.bfloat16).to(CUDA)
    want = ops.vq_linear(x, *vq, None)
    x[3, 1000], x[40] = float("nan"), 0.0
    y = ops.vq_linear(x, *vq, None)
    assert not y[3].isfinite().any()
    assert not y[40].any()
    others = [token for token in range(64) if token not in (3, 40)]
    assert_same_bits(y[others], want[others])


@pytest.mark.parametrize("scale", [1e30, 1e-30, 0.0])
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8)])
@pytest.mark.parametrize("tokens", [1, 8])
def test_vq_gemv_of_extreme_inputs(d: int, code_bits: int, tokens: int, scale: float) -> None:
    vq = [tensor.to(CUDA) for tensor in random_vq(512, 1024, d, code_bits)]
    weight = ops.vq_dequantize(*vq, torch.float32)
    x = activations(tokens, 1024, torch.float32).to(CUDA) * scale
    y = ops.vq_gemv(x, *vq)
    if scale:  # near 1, where the bound's slack for sums of almost nothing is small
        y, x = y / scale, x / scale
    assert_within_bound(y, x, weight, None)
    x[0, 1000] = float("nan")
    assert not ops.vq_gemv(x, *vq)[0].isfinite().any()


@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8)])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 150])
def test_vq_linear_in_a_graph(d: int, code_bits: int, tokens: int) -> None:
    """Layers one after another, each of several kernels that start before the last one's end."""
    layers = [[t.to(CUDA) for t in random_vq(2048, 2048, d, code_bits)] for _ in range(3)]
    x = activations(tokens, 2048, torch.bfloat16).to(CUDA) * 0.05

    def all_layers() -> Tensor:
        return functools.reduce(lambda y, vq: ops.vq_linear(y, *vq, None), layers, x)

    want = all_layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = all_layers()
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert_same_bits(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("cols", [1028, 4144])  # of these tensor cores take the second
def test_sparse(dtype: torch.dtype, pattern: str | None, cols: int) -> None:
    w = randn(515, cols)
    bitmap = (
        ops.prune_select_nm(w, torch.ones(cols), 2, 4)
        if pattern
        else ops.prune_select(w, torch.ones(cols), w.numel() // 2)
    )
    assert_op_agrees(ops.sparse_offsets, bitmap, cols)
    offsets = ops.sparse_offsets(bitmap, cols)
    kept = int(offsets[-1])
    assert_op_agrees(ops.sparse_pack, w.to(dtype), bitmap, offsets, kept)
    values = ops.sparse_pack(w.to(dtype), bitmap, offsets, kept)
    assert_op_agrees(ops.sparse_dequantize, bitmap, values, offsets, cols, torch.bfloat16)
    dense = ops.sparse_dequantize(bitmap, values, offsets, cols, torch.float32)
    sparse = [tensor.to(CUDA) for tensor in (bitmap, values, offsets)]
    x = activations(16, cols, dtype).to(CUDA)
    for tokens in (1, 3, 16):
        y = ops.sparse_gemv(x[:tokens], *sparse)
        assert_within_bound(y, x[:tokens], dense, None)


@pytest.mark.parametrize("method", [{"method": "vq", "d": 4, "bits": 2}, {"method": "prune"}])
def test_generation_under_a_graph(method: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    """Token by token what the same model writes without, more than once."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 9).to(CUDA)
    nowag_ext.compress_model(model, random_act_norms(model), **method)
    # In float32, of which nothing is rounded away: siblings' sums are cut elsewhere under a graph.
    model.to(CUDA)
    assert decodes_under_graph(model)

    def written() -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20,
            do_sample=False, pad_token_id=0, cache_implementation="static", disable_compile=True,
        )  # fmt: skip

    class Counted(CudaGraphs):
        replays = 0

        def second(self, *arguments: Any) -> Captured:
            captured = super().second(*arguments)

            def counted() -> None:
                self.replays += 1
                captured.replay()

            return replace(captured, replay=counted)

    want, graphs = written(), Counted()
    with nowag_ext.decode_graph(model, graphs):
        for _ in range(2):
            assert torch.equal(written(), want)
    assert graphs.replays == 2 * 17  # the prompt gives a token, one is eager, and one captured
    assert not [one for one in recwarn if "could not be captured" in str(one.message)]


def test_compression_gives_the_bits_of_the_cpu() -> None:
    w, act_norms = randn(512, 600), randn(600, seed=1).abs() + 0.1
    settings = {"d": 4, "bits": 2, "iters": 10}
    got = vq_compress(w.to(CUDA), act_norms.to(CUDA), **settings)
    want = vq_compress(w, act_norms, **settings)
    for name, tensor in got.tensors().items():
        assert tensor.is_cuda
        assert_same_bits(tensor, want.tensors()[name])
    pruned = prune(w.to(CUDA), act_norms.to(CUDA), sparsity=0.5)
    for name, tensor in pruned.tensors().items():
        assert_same_bits(tensor, prune(w, act_norms, sparsity=0.5).tensors()[name])


@pytest.mark.parametrize("kind", ["vq", "sparse"])
def test_linear_in_a_graph_and_on_another_stream(kind: str) -> None:
    w, act_norms = randn(512, 768).to(CUDA), torch.ones(768, device=CUDA)
    if kind == "vq":
        layer = VQLinear.from_weight(vq_compress(w, act_norms, d=4, bits=2, iters=3))
    else:
        layer = SparseLinear.from_weight(prune(w, act_norms, pattern="2:4"))
    x = activations(1, 768, torch.bfloat16).to(CUDA)
    want = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same_bits(layer(x), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out, want)


def test_repeats_give_the_same_bits() -> None:
    vq = [tensor.to(CUDA) for tensor in random_vq(4096, 4096, 6, 12)]
    for tokens in (1, 8, 16):
        x = activations(tokens, 4096, torch.bfloat16).to(CUDA)
        first = ops.vq_gemv(x, *vq)
        for _ in range(50):
            assert_same_bits(ops.vq_gemv(x, *vq), first)
