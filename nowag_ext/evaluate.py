"""How good a causal LM is: perplexity, KL divergence to the dense model, gemv path against gemm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nowag_ext.decoder import check_tokens
from nowag_ext.report import Progress

# Positions whose logits are turned into fp32 distributions at a time: a vocabulary of 128k entries
# over a whole window would take gigabytes.
_POSITIONS = 128
_LARGEST_EXPONENT = 700.0  # of exp in float64


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text cut into non-overlapping windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        window: tokens a window; its first token is not predicted.
        windows: number of windows read.
    """

    perplexity: float
    window: int
    windows: int

    @property
    def predicted(self) -> int:
        """Number of tokens predicted."""
        return self.windows * (self.window - 1)

    def protocol(self) -> str:
        """How it was measured, in words."""
        return (
            f"first {self.windows} non-overlapping windows of {self.window} tokens, no BOS added, "
            "the first token of each not predicted"
        )


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one it came from.

    Attributes:
        perplexity: the model's.
        kl_divergence: mean KL(dense || model) of the next-token distributions, in nats, over every
            position of every window.
    """

    perplexity: Perplexity
    kl_divergence: float


@dataclass(frozen=True)
class TeacherForcedCheck:
    """The same tokens one at a time with a cache (the gemv kernels) and in one pass (the GEMM).

    Attributes:
        tokens: number of tokens fed.
        nll_stepwise, nll_one_pass: mean negative log-likelihood in nats of tokens 1, 2, ...
        argmax_agreement: share of positions where both give the same most likely next token.
    """

    tokens: int
    nll_stepwise: float
    nll_one_pass: float
    argmax_agreement: float

    @property
    def relative_difference(self) -> float:
        """|nll_stepwise - nll_one_pass| / nll_one_pass."""
        return abs(self.nll_stepwise - self.nll_one_pass) / self.nll_one_pass


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The whole text tokenised once, without special tokens: int64 [tokens]."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the text holds no tokens.")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def split_windows(tokens: Tensor, window: int, windows: int | None = None) -> Tensor:
    """The first ``windows`` (or all) full windows of a token sequence, [windows, window].

    Raises:
        ValueError: a window under 2 tokens, windows under 1, or a text shorter than one window.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens to predict one, not {window}.")
    if windows is not None and windows < 1:
        raise ValueError(f"the number of windows must be at least 1, not {windows}.")
    available = tokens.numel() // window
    if available == 0:
        raise ValueError(
            f"the text has {tokens.numel()} tokens, less than one window of {window}: "
            "give a longer text or a smaller window."
        )
    count = available if windows is None else min(windows, available)
    return tokens[: count * window].view(count, window)


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity over non-overlapping windows of a text, each seen on its own.

    Args:
        model: a Hugging Face causal LM.
        tokens: int64 [n], the whole text from ``tokenize``.
        window: tokens a window. The first of each is not predicted, and no BOS is added.
        windows: how many windows from the start of the text; None for all of them.
        progress: called with ("perplexity", windows done, windows in all).

    Raises:
        ValueError: the text is shorter than one window, the model does not know its tokens or so
            many positions, or the likelihood is not finite.
    """
    batches = split_windows(tokens, window, windows)
    total = 0.0
    for batch, logits in _logits(model, batches, "perplexity", progress):
        total += _nll_sum(logits[:-1], batch[1:])
    return _perplexity(total, batches)


def compare_with_dense(
    model: nn.Module,
    dense: nn.Module,
    tokens: Tensor,
    *,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Perplexity, and how far the next-token distributions are from the dense model's.

    Arguments and errors are those of ``perplexity``; the models are run side by side.
    """
    batches = split_windows(tokens, window, windows)
    nll, divergence = 0.0, 0.0
    expectations = _logits(dense, batches, "", None)
    actuals = _logits(model, batches, "KL divergence", progress)
    for (_, expected), (batch, actual) in zip(expectations, actuals, strict=True):
        nll += _nll_sum(actual[:-1], batch[1:])
        divergence += _kl_sum(expected, actual)
    return Comparison(_perplexity(nll, batches), divergence / batches.numel())


def teacher_forced_check(
    model: nn.Module, tokens: Tensor, *, count: int = 256, progress: Progress | None = None
) -> TeacherForcedCheck:
    """Feeds the first ``count`` tokens one at a time with a cache, and again in one pass.

    Raises:
        ValueError: fewer than ``count`` tokens, or more than the model has positions for.
    """
    sequence = split_windows(tokens, count, 1)
    check_tokens(model, sequence)
    with torch.inference_mode():
        stepwise = _stepwise_logits(model, sequence[0], progress)
        one_pass = _forward(model, sequence).logits[0].float()
    targets = sequence[0, 1:].to(one_pass.device)
    return TeacherForcedCheck(
        tokens=count,
        nll_stepwise=_nll_sum(stepwise[:-1], targets) / (count - 1),
        nll_one_pass=_nll_sum(one_pass[:-1], targets) / (count - 1),
        argmax_agreement=float((stepwise.argmax(-1) == one_pass.argmax(-1)).double().mean()),
    )


def _forward(model: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
    kwargs.setdefault("use_cache", False)
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), **kwargs)


def _logits(
    model: nn.Module, batches: Tensor, stage: str, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens [window], logits [window, vocabulary]) of each window, one pass each."""
    check_tokens(model, batches)
    training = model.training
    model.eval()
    try:
        for index, batch in enumerate(batches):
            with torch.inference_mode():
                logits = _forward(model, batch[None]).logits[0]
            yield batch.to(logits.device), logits
            if progress is not None:
                progress(stage, index + 1, len(batches))
    finally:
        model.train(training)


def _stepwise_logits(model: nn.Module, sequence: Tensor, progress: Progress | None) -> Tensor:
    """Logits fp32 [tokens, vocabulary] of a sequence fed one token at a time."""
    rows: list[Tensor] = []
    cache = None
    for index, token in enumerate(sequence):
        output = _forward(model, token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].float())
        if progress is not None:
            progress("token by token", index + 1, sequence.numel())
    return torch.stack(rows)


def _perplexity(nll: float, batches: Tensor) -> Perplexity:
    """From the summed negative log-likelihood of all but the first token of each window."""
    windows, window = batches.shape
    mean = nll / (windows * (window - 1))
    if not math.isfinite(mean):
        raise ValueError(
            f"the model's mean negative log-likelihood is {mean}, not a finite number."
        )
    return Perplexity(math.exp(min(mean, _LARGEST_EXPONENT)), window, windows)


def _kl_sum(expected: Tensor, actual: Tensor) -> float:
    """Sum over rows of KL(softmax(expected) || softmax(actual)), logits [n, vocabulary]."""
    total = 0.0
    for p, q in zip(expected.split(_POSITIONS), actual.split(_POSITIONS), strict=True):
        p_log, q_log = F.log_softmax(p.float(), -1), F.log_softmax(q.float(), -1)
        total += float(F.kl_div(q_log, p_log, reduction="sum", log_target=True).double())
    return total


def _nll_sum(logits: Tensor, targets: Tensor) -> float:
    """Sum of the negative log-likelihoods of ``targets`` [n] under ``logits`` [n, vocabulary]."""
    total = 0.0
    for part, target in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        total += float(F.cross_entropy(part.float(), target, reduction="sum").double())
    return total
