"""Comparisons of tensors that say on failure where they differ, what came and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

_SHOWN = 5
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(got: Tensor, want: Tensor, what: object = "") -> None:
    """The same shape, dtype and bits: 0.0 is not -0.0, and a NaN is itself.

    Args:
        what: which of several comparisons this is, for the message.
    """
    __tracebackhide__ = True
    forms = [f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (got, want)]
    if forms[0] != forms[1]:
        raise AssertionError(f"{_prefix(what)}got {forms[0]}, want {forms[1]}")
    got, want = got.detach().cpu().contiguous(), want.detach().cpu().contiguous()
    bits = _BITS[want.element_size()]
    differs = got.view(-1).view(bits) != want.view(-1).view(bits)
    if differs.any():
        raise AssertionError(_prefix(what) + _report(got, want, differs.view(want.shape)))


def assert_within(
    got: Tensor, want: Tensor | float, bound: Tensor | float, what: object = ""
) -> None:
    """|got - want| <= bound everywhere, in float64; a NaN is within no bound.

    Args:
        want, bound: of ``got``'s shape, or what broadcasts to it.
        what: which of several comparisons this is, for the message.
    """
    __tracebackhide__ = True
    if isinstance(want, Tensor) and torch.broadcast_shapes(got.shape, want.shape) != got.shape:
        raise AssertionError(
            f"{_prefix(what)}got shape {tuple(got.shape)}, want shape {tuple(want.shape)}"
        )
    expected, allowed = (
        torch.as_tensor(part).detach().cpu().double().expand(got.shape) for part in (want, bound)
    )
    got = got.detach().cpu()
    outside = ~((got.double() - expected).abs() <= allowed)
    if outside.any():
        raise AssertionError(_prefix(what) + _report(got, expected, outside, allowed))


def _prefix(what: object) -> str:
    return f"{what}: " if what != "" else ""


def _report(got: Tensor, want: Tensor, wrong: Tensor, bound: Tensor | None = None) -> str:
    """A table of the first wrong elements and the worst: by its bound where there is one."""
    difference = (got.double() - want.double())[wrong]
    excess = difference.abs() if bound is None else difference.abs() / bound[wrong]
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    columns = {
        "index": [str(tuple(index)) for index in wrong.nonzero().tolist()],
        "got": got[wrong].tolist(),
        "want": want[wrong].tolist(),
        "difference": difference.tolist(),
    }
    if bound is not None:
        columns["bound"] = bound[wrong].tolist()
    count = len(difference)
    lines = [_line(list(columns), "")]
    for row in (*range(min(_SHOWN, count)), worst):
        note = f"  the worst of all {count}" if len(lines) > min(_SHOWN, count) else ""
        lines.append(_line([column[row] for column in columns.values()], note))
    return (
        f"{count} of {got.numel()} elements of {got.dtype} of shape {tuple(got.shape)} are "
        + ("not the same bits" if bound is None else "not within the bound")
        + "".join(f"\n  {line}" for line in lines)
    )


def _line(cells: list[object], note: str) -> str:
    return " ".join(f"{_text(cell):>16}" for cell in cells) + note


def _text(cell: object) -> str:
    return f"{cell:.9g}" if isinstance(cell, float) else str(cell)
