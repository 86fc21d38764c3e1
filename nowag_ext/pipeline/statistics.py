"""What calibration text says of a group of linears: their Hessian, and what their targets lack."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from nowag_ext.hessian import cholesky_
from nowag_ext.pipeline.ranks import Ranks

# The Hessian is symmetric: of each block of so many rows only what is right of the diagonal.
_BLOCK_COLUMNS = 256

# Rows of other sums that are added to at once, between which signals are answered.
_SUM_ROWS = 2048

# Rows of a weight that are corrected at once, times the square of its inputs: signals are answered
# in between, within a second.
_PART = 1 << 34

# A token that has more energy than so many of the median one counts as if it had no more, of what a
# linear reads and of what it is wanted to give. The first token of a window may have 99.6 % of the
# energy of 1024 inputs (before the down_proj that makes it an attention sink), and after that 80 %
# or more of what the residual streams differ by: sums in which it counted in full would show
# nothing else.
_MOST_ENERGY = 10

# The least squares for corrections are damped as if so many more tokens for each input had been
# seen, with inputs that do not correlate and lack nothing: what little text says fits that text
# alone.
_UNSEEN = 12


class GroupStatistics:
    """Sums over tokens of two streams, the dense model's and that of what is compressed so far.

    With x the input of the group in the dense stream and x~ in the compressed one: the Hessian
    E[x~ x~^T], and for each linear the correlation E[x~ D^T] with the extra output D that it is
    wanted to give. For a linear whose output is added to the residual stream D is what the dense
    stream has after the addition and the compressed one, the linear still dense, has not; for
    others (x - x~) W^T.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        # Right of the diagonal and on it: sum x~ x~^T. In the end: E[x~ x~^T].
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._drift: Tensor | None = None  # sum of x~ (x - x~)^T, where a linear needs it
        # Sum of x~ (D + x~ W^T)^T by linear, where its output is added to the residual stream.
        self._wanted: dict[str, Tensor] = {}
        self._paired = True
        self._ended = False

    def add(self, inputs: Tensor) -> None:
        """One stream alone: inputs [tokens, in_features], fp32."""
        self._add(_weighted(inputs, _token_weights(inputs)))

    def _add(self, inputs: Tensor) -> None:
        for first in range(0, inputs.shape[1], _BLOCK_COLUMNS):
            here = slice(first, first + _BLOCK_COLUMNS)
            self._upper[here, first:].addmm_(inputs[:, here].T, inputs[:, first:])
        self.tokens += len(inputs)

    def add_pair(
        self,
        dense: Tensor,
        compressed: Tensor,
        after: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        *,
        all_summed: bool,
    ) -> None:
        """Both streams' inputs, and by linear the residual stream to which its output is added.

        Args:
            dense, compressed: inputs [tokens, in_features], fp32.
            after: the dense stream with the output added, [tokens, out_features].
            before: the compressed stream without it, but with the linear's bias.
            all_summed: every linear of the group is in them.
        """
        # Where tokens are routed differently in the two streams they cannot be compared.
        self._paired &= dense.shape == compressed.shape
        if not self._paired:
            self.add(compressed)
            return
        wanted = {name: states - before[name] for name, states in after.items()}
        weights = _token_weights(compressed, *wanted.values())
        inputs = _weighted(compressed, weights)
        self._add(inputs)
        if not all_summed:
            if self._drift is None:
                self._drift = torch.zeros_like(self._upper)
            _add_product(self._drift, inputs, _weighted(dense - compressed, weights))
        for name, outputs in wanted.items():
            if name not in self._wanted:
                self._wanted[name] = outputs.new_zeros(inputs.shape[1], outputs.shape[1])
            _add_product(self._wanted[name], inputs, _weighted(outputs, weights))

    def add_up(self, ranks: Ranks) -> None:
        """Adds what the other ranks have seen, each in windows of its own (at least one)."""
        counts = torch.tensor([self.tokens, not self._paired], device="cpu")
        ranks.add_up([counts])
        self.tokens, self._paired = int(counts[0]), int(counts[1]) == 0
        ranks.add_up([self._upper])
        if self._paired:
            ranks.add_up(sums for sums in (self._drift, *self._wanted.values()) if sums is not None)

    def hessian(self) -> Tensor:
        """E[x~ x~^T], exactly symmetric. Ends the sums, in whose memory it is."""
        if not self._ended:
            self._upper /= self.tokens
            size = len(self._upper)
            for first in range(0, size, _BLOCK_COLUMNS):
                end = min(first + _BLOCK_COLUMNS, size)
                square = self._upper[first:end, first:end]
                square.copy_(square.triu() + square.triu(1).T)
                self._upper[end:, first:end] = self._upper[first:end, end:].T
            self._ended = True
        return self._upper

    def corrections(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By linear, what to add to its weight W, fp32 [out_features, in_features].

        Least squares for D, damped.
        """
        if not self._paired:
            return {}
        lower = self.hessian().clone()
        damping = _UNSEEN * len(lower) / self.tokens
        lower.diagonal().add_(damping * float(lower.diagonal().mean()))
        if not cholesky_(lower):
            return {}
        step = max(1, _PART // len(lower) ** 2)
        corrections = {}
        for name, weight in weights.items():
            if name not in self._wanted and self._drift is None:
                continue
            correction = corrections[name] = lower.new_empty(weight.shape)
            for first in range(0, len(weight), step):
                here = slice(first, first + step)
                lack = self._lack(name, here, weight[here].float().T)
                # cholesky_solve, which would copy the factor.
                half = solve_triangular(lower, lack, upper=False)
                correction[here] = solve_triangular(lower.mT, half, upper=True).T
        return corrections

    def _lack(self, name: str, outputs: slice, weight: Tensor) -> Tensor:
        """E[x~ D^T] of some outputs of a linear, whose weight is [in_features, outputs]."""
        if name in self._wanted:
            wanted = self._wanted[name][:, outputs] / self.tokens
            return wanted.addmm_(self.hessian(), weight, alpha=-1)
        assert self._drift is not None
        return (self._drift @ weight).div_(self.tokens)


def _token_weights(*kinds: Tensor) -> Tensor | None:
    """What each token is multiplied by, [tokens, 1], where one has too much energy of some kind."""
    weights: Tensor | None = None
    for rows in kinds:
        energy = rows.square().sum(1)
        most = _MOST_ENERGY * energy.median() if len(energy) > 0 else energy.sum()
        if most > 0 and energy.max() > most:
            own = (most / energy).clamp(max=1).sqrt()[:, None]
            weights = own if weights is None else torch.minimum(weights, own)
    return weights


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, a few rows at a time, between which signals are answered."""
    for first in range(0, len(total), _SUM_ROWS):
        here = slice(first, first + _SUM_ROWS)
        total[here].addmm_(left[:, here].T, right)
