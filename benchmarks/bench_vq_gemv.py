"""VQ linear layers, d=4 K=256 and d=6 K=4096, against torch's dense product: any tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from nowag_ext import ops, reference

FEW = [1, 2, 4, 8, 16]
MANY = [17, 32, 64, 128, 256, 512]
SHAPES = {
    (4096, 11008): [*FEW, *MANY],
    (4096, 4096): FEW,
    (11008, 4096): FEW,
    (576, 1536): FEW,
    (8192, 28672): [1, 8],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = {"d=4": (4, 8), "d=6": (6, 12)}
WORST_ERROR = 2e-3  # of ||y - y64|| / ||y64||, the bound of vq_gemv.h

VQ = tuple[Tensor, Tensor, Tensor, Tensor]


def random_vq(rows: int, cols: int, d: int, code_bits: int) -> VQ:
    codes = torch.randint(0, 256, ops.packed_shape(rows, cols, d, code_bits), dtype=torch.uint8)
    codebook = (torch.randn(2**code_bits, d) / cols**0.5).half()
    return codes, codebook, (0.5 + torch.rand(rows)).half(), (0.5 + torch.rand(cols)).half()


def validate(vq: VQ) -> None:
    """The first rows of the layer, on inputs with outlier channels."""
    codes, codebook, row_norms, col_norms = vq
    part = (codes[:32].contiguous(), codebook, row_norms[: 32 * 32].contiguous(), col_norms)
    x = torch.randn(1, col_norms.numel())
    x[:, ::97] *= 40
    exact = reference.vq_linear(x, *part)
    error = (ops.vq_gemv(x, *part).double() - exact).norm() / exact.norm()
    if error > WORST_ERROR:
        raise SystemExit(f"relative error {error:.2e}, more than {WORST_ERROR}")


def calls(
    function: Callable[[Any], Any], copies: list[Any], first: int = 0
) -> list[Callable[[], Any]]:
    """One closure for each copy of the weight, from copy `first` on."""
    return [lambda copy=copy: function(copy) for copy in copies[first:] + copies[:first]]


class Layer:
    """One shape's weights in every form.

    The contenders take turns, so that between two uses of an operand all the others are read:
    copies are counted such that together they exceed the caches.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        rows, cols = self.shape = shape
        # A weight is 4 + 2 bytes dense and twice a quarter of a byte in codes.
        self.copies = harness.rotation_count(int(6.5 * rows * cols))
        weight = torch.randn(shape)
        self.dense = {
            name: [weight.to(dtype, copy=True) for _ in range(self.copies)]
            for name, dtype in DTYPES.items()
        }
        self.vq: dict[str, list[VQ]] = {}
        for name, form in FORMS.items():
            vq = random_vq(rows, cols, *form)
            if rows >= 32 * 32:
                validate(vq)
            self.vq[name] = [(vq[0].clone(), *vq[1:]) for _ in range(self.copies)]


def bench(report: harness.Report, layer: Layer, tokens: int, seconds: float) -> None:
    contenders: dict[str, list[Callable[[], Any]]] = {}
    cost: dict[str, dict[str, int]] = {}
    rows, cols = layer.shape
    flops = 2 * tokens * rows * cols
    linear = torch.nn.functional.linear
    for name, dtype in DTYPES.items():
        x = torch.randn(tokens, cols).to(dtype)
        for form, copies in layer.vq.items():
            # Half a round apart, so that no dtype finds in the cache what another has just read.
            first = 0 if name == "fp32" else layer.copies // 2
            contenders[f"{form} {name}"] = calls(lambda w, x=x: ops.vq_linear(x, *w), copies, first)
            cost[f"{form} {name}"] = {"bytes": sum(t.nbytes for t in copies[0]), "flops": flops}
        dense = layer.dense[name]
        contenders[f"dense {name}"] = calls(lambda w, x=x: linear(x, w), dense)
        cost[f"dense {name}"] = {"bytes": dense[0].nbytes, "flops": flops}
    timings = harness.compare(contenders, seconds)
    report.add(f"{rows}x{cols}, {tokens}", timings, ["dense fp32", "dense bf16"], cost)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", default="", help="only shapes whose name, 4096x4096, holds this")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = harness.Report("vq_gemv")
    with torch.no_grad():
        for shape, counts in SHAPES.items():
            if options.only not in f"{shape[0]}x{shape[1]}":
                continue
            layer = Layer(shape)
            for tokens in counts:
                bench(report, layer, tokens, options.seconds)
            del layer
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
