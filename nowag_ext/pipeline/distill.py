"""Distillation: what is continuous in packed weights moves until the model says what another says.

Codes and masks stay; norms, codebook entries and kept values follow the gradient of the divergence
from the dense model's predictions (as AQLM, Egiazarian et al., 2024, and QuIP#, Tseng et al., 2024,
end). Of the compressed model as many layers are dense at a time as there is room for, or one: what
each layer reads is kept, and on the way back those are run again that had to be forgotten.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nowag_ext.calibrate import checked_windows
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.linear import PackedLinear, PackedWeight
from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.pipeline.head import Head
from nowag_ext.pipeline.streams import embedded
from nowag_ext.pipeline.tuned import TunedTensors
from nowag_ext.report import Distillation, Progress, peak_memory
from nowag_ext.resume import LayerStore, open_store, state_key
from nowag_ext.side_files import report_of

# Steps over which the learning rate rises, at most: the first gradients say little of the next.
_WARM_UP = 5

_BETAS = (0.9, 0.95)
# Gradients of SmolLM2 at 2 bits are 1e-4 and more; steps shall not be made of rounding errors.
_EPSILON = 1e-6

# Tokens whose logits are in memory at once.
_HEAD_TOKENS = 256

# What may be held of the layers on the way there for the way back; the rest is run again.
_RECORD_BYTES = 1 << 30

# How often what has been reached is kept, in seconds; and what that may cost, as a share of time.
_KEEP_EVERY = 60.0
_KEEPING = 0.05

# Between the seeds of passes, so that the passes of neighbouring seeds have no order in common.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@ordinary_tensors
def distill(
    model: Any,
    dense: Any,
    tokens: Tensor,
    *,
    passes: int = 1,
    learning_rate: float = 3e-3,
    seed: int = 0,
    work_dir: str | os.PathLike[str] | LayerStore | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Tunes a compressed causal LM to predict what the dense one predicts, at the same bits.

    Minimises the mean of KL(dense || compressed) over the tokens with Adam, one window a step. What
    is stored keeps its form and size: codes and masks do not change. The tensors are replaced at
    the very end: after any exception, an interrupt included, the model is as it was. Beside both
    models it takes 16 bytes for each value of a pruned layer that is kept, and little for others.

    Args:
        model: what ``compress`` or ``compress_model`` returned, or ``load`` loaded. Changed in
            place.
        dense: the model that it was made from, or a better one with the same tokens. Its layers may
            be on disk.
        tokens: text, int64 or int32 [windows, length], without padding. Other text than the
            compression was calibrated on, which it fits already.
        passes: how often each window is gone through, in another order each time.
        learning_rate: the largest, in relative terms: it rises for some steps, and falls to 0 as a
            cosine. Below 1.
        seed: of the order.
        work_dir: a directory for what has been reached: the same call, interrupted, goes on from
            there and, on the CPU, ends in the same bits (at the same number of threads); remove it
            when the model is saved. None: nothing is kept.
        offload_dir: a directory for the dense model's hidden states, 4 bytes a token and hidden
            unit, which are otherwise in memory.
        progress: called with (what is done, how much, of how much): first in layers of the dense
            model, then in steps.

    Returns:
        What was done; the model's ``nowag_report``, if it has one, says it too, in place of what an
        earlier distillation has left there.

    Raises:
        ValueError: the model is not compressed, the models have other vocabularies, unfit tokens or
            settings, or a divergence or gradient that is not finite.
        TypeError: tokens that are no integers, or no tensor.
        OSError: a full disk.
    """
    start = time.perf_counter()
    check_distillation(passes, learning_rate, seed)
    modules = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, PackedLinear) and part is not model.get_output_embeddings()
    }
    if not modules:
        raise ValueError("the model is not compressed: compress it first.")
    windows = checked_windows(model, tokens)
    checked_windows(dense, tokens)
    student = _Student(model, windows.shape[1], modules)
    with open_store(work_dir) as store:
        wanted, head = _predictions(dense, windows, student, offload_dir, progress)
        run = _Run(student, windows, wanted, head, learning_rate, passes, seed, store)
        divergences = run.through(progress)
    student.tuned.install(modules)
    learnt = Distillation(
        passes=passes, tokens=windows.numel(), learning_rate=learning_rate, seed=seed,
        divergences=tuple(divergences), seconds=time.perf_counter() - start,
        peak_memory=peak_memory(),
    )  # fmt: skip
    report = report_of(model)
    if report is not None:
        model.nowag_report = replace(report, distillation=learnt)
    return learnt


def check_distillation(passes: int, learning_rate: float, seed: int) -> None:
    """Raises ValueError for settings of ``distill`` that are out of range."""
    if type(passes) is not int or passes < 1:
        raise ValueError(f"passes must be a positive integer, not {passes!r}.")
    if not isinstance(learning_rate, int | float) or not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate must be a number above 0, below 1, not {learning_rate!r}.")
    if type(seed) is not int or not 0 <= seed < 2**62:
        raise ValueError(f"seed must be an integer from 0 to 2^62 - 1, not {seed!r}.")


def _predictions(
    dense: Any,
    windows: Tensor,
    student: _Student,
    directory: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> tuple[Tensor, Head]:
    """What the dense model's last layer returns for the windows, and what it makes of that."""
    blocks = Blocks(dense, windows.shape[1])
    head = Head(dense, blocks, like=student.head)
    hidden = embedded(blocks, windows, directory)
    sizes = (
        head(hidden[:1, :1]).shape[-1],
        student.head(student.embed(windows[:1])[:, :1]).shape[-1],
    )
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the dense model chooses among {sizes[0]} tokens and the compressed one among "
            f"{sizes[1]}: both must have the same vocabulary."
        )
    for index in range(len(blocks.layers)):
        if progress is not None:
            progress("layers of the dense model", index, len(blocks.layers))
        block = blocks.copied(index)
        for window in hidden.split(1):
            window.copy_(block.run(index, window))
    return hidden, head


class _Student:
    """The compressed model, whose layers are dense while they are visited."""

    def __init__(self, model: Any, length: int, modules: Mapping[str, PackedLinear]) -> None:
        self._model = model
        self.tuned = TunedTensors({name: module.weight_form() for name, module in modules.items()})
        self._blocks = Blocks(model, length)
        self.layers = range(len(self._blocks.layers))
        self.head = Head(model, self._blocks)

    def tensors(self) -> Iterator[Tensor]:
        """All that its predictions follow from."""
        yield from self._model.state_dict().values()

    def embed(self, ids: Tensor) -> Tensor:
        return self._blocks.embed(ids).float()

    def visit(self, index: int, hidden: Tensor) -> _Visit:
        """Runs a layer, recorded."""
        blocks = self._blocks.copied(index)
        names = blocks.linears(index, PackedLinear)
        weights = {name: self.tuned.weight(name) for name in names}
        dense = {name: weight.dequantize().requires_grad_() for name, weight in weights.items()}
        forwards: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, weight in dense.items():
            bias = blocks.bias(index, name)
            forwards[name] = partial(functional.linear, weight=weight, bias=bias)
        hidden = hidden.detach().requires_grad_()
        saved: dict[int, int] = {}

        def save(tensor: Tensor) -> tuple[Tensor, int]:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach(), tensor._version  # itself would hold what holds it

        with torch.autograd.graph.saved_tensors_hooks(save, _unchanged):
            output = blocks.recorded(index, hidden, forwards)
        return _Visit(hidden, weights, dense, output, sum(saved.values()))

    def back(self, visit: _Visit, gradient: Tensor) -> Tensor:
        """The gradient of what a layer has read, from its output's; adds those of its weights."""
        inputs = (visit.hidden, *visit.dense.values())
        found, *grads = torch.autograd.grad(visit.output, inputs, gradient, allow_unused=True)
        for (name, weight), grad in zip(visit.weights.items(), grads, strict=True):
            if grad is not None:  # an expert that no token is routed to has none
                self.tuned.add(name, weight, grad)
        return found


@dataclass
class _Visit:
    """A recorded run of a layer: what it has read and returned, its weights, packed and dense.

    Attributes:
        nbytes: of all that the record holds.
    """

    hidden: Tensor
    weights: dict[str, PackedWeight]
    dense: dict[str, Tensor]
    output: Tensor
    nbytes: int


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "a layer writes into a tensor that its gradient follows from: it cannot be tuned."
        )
    return tensor


def _same(visit: _Visit) -> _Visit:
    return visit


class _Run:
    """All steps of a distillation, and how far they have come."""

    def __init__(
        self,
        student: _Student,
        windows: Tensor,
        wanted: Tensor,
        head: Head,
        learning_rate: float,
        passes: int,
        seed: int,
        store: LayerStore | None,
    ) -> None:
        self._student, self._windows = student, windows
        self._wanted, self._head = wanted, head
        self._rate, self._passes, self._seed = learning_rate, passes, seed
        self._store = store
        self._steps = student.tuned.steps
        self._optimizer = torch.optim.Adam(self._steps.values(), betas=_BETAS, eps=_EPSILON)
        self._divergences: list[float] = []  # of each step so far
        self._key = "" if store is None else state_key(
            (*student.tensors(), *head.tensors(), windows, *wanted), [learning_rate, passes, seed]
        )  # fmt: skip

    def through(self, progress: Progress | None) -> list[float]:
        """The mean divergence of each pass, of the windows while the model moves."""
        count = len(self._windows)
        total = self._passes * count
        self._take_up()
        kept, took = time.monotonic(), 0.0
        for step in range(len(self._divergences), total):
            if progress is not None:
                recent = self._divergences[-count:]
                now = f", KL {sum(recent) / len(recent):.3f}" if recent else ""
                progress(f"distillation{now}", step, total)
            self._divergences.append(self._step(self._window(step), self._rate_at(step, total)))
            passed = time.monotonic() - kept
            if self._store is not None and passed >= max(_KEEP_EVERY, took / _KEEPING):
                self._keep()
                took = time.monotonic() - kept - passed
                kept = time.monotonic()
        if progress is not None:
            progress("distillation", total, total)
        return [
            sum(self._divergences[first : first + count]) / count
            for first in range(0, total, count)
        ]

    def _window(self, step: int) -> int:
        done, place = divmod(step, len(self._windows))
        generator = torch.Generator().manual_seed((self._seed + done * _SEED_STRIDE) % 2**63)
        return int(torch.randperm(len(self._windows), generator=generator)[place])

    def _rate_at(self, step: int, total: int) -> float:
        rise = min(1.0, (step + 1) / min(_WARM_UP, total))
        return self._rate * rise * 0.5 * (1 + math.cos(math.pi * step / total))

    def _step(self, window: int, rate: float) -> float:
        """Moves by one window; the divergence before."""
        student = self._student
        hidden = student.embed(self._windows[window, None])
        visits: list[Callable[[], _Visit]] = []  # made again where there is no room for the record
        room = _RECORD_BYTES
        for index in student.layers:
            visit = student.visit(index, hidden)
            room -= visit.nbytes
            again = partial(student.visit, index, hidden)
            visits.append(again if room < 0 else partial(_same, visit))
            hidden = visit.output.detach()
            del visit
        divergence, gradient = self._divergence(hidden, self._wanted[window, None])
        self._check_finite("divergence from the dense model", divergence)
        while visits:
            gradient = student.back(visits.pop()(), gradient)
        sums = [step.grad.sum() for step in self._steps.values() if step.grad is not None]
        self._check_finite("gradient's sum", float(sum(sums)))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        return divergence

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            done = len(self._divergences)
            advice = "a lower learning_rate may help" if done else "one of the models is damaged"
            raise ValueError(f"the {what} is {value} after {done} steps, not finite: {advice}.")

    def _divergence(self, hidden: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """Mean KL(dense || compressed) over tokens, and its gradient for the hidden states."""
        total, gradients = 0.0, []
        for part, target in zip(
            hidden.split(_HEAD_TOKENS, 1), wanted.split(_HEAD_TOKENS, 1), strict=True
        ):
            expected = torch.log_softmax(self._head(target), -1)
            with torch.inference_mode(False), torch.enable_grad():
                leaf = part.detach().requires_grad_()
                said = torch.log_softmax(self._student.head(leaf), -1)
                divergence = functional.kl_div(said, expected, reduction="sum", log_target=True)
                divergence = divergence / hidden.shape[1]
            gradients.append(torch.autograd.grad(divergence, leaf)[0])
            total += float(divergence)
        return total, torch.cat(gradients, 1)

    def _keep(self) -> None:
        """Keeps how far it has come."""
        assert self._store is not None
        tensors = {}
        for (name, step), state in zip(self._steps.items(), self._states(), strict=True):
            tensors[name] = step
            tensors |= {f"{part} of {name}": value for part, value in state.items()}
        self._store.put_state(self._key, tensors, self._divergences)

    def _take_up(self) -> None:
        """Goes on from what is kept, if there is something."""
        found = None if self._store is None else self._store.get_state(self._key)
        if found is None:
            return
        tensors, self._divergences = found
        known = self._optimizer.state_dict()
        for index, (name, step) in enumerate(self._steps.items()):
            step.copy_(tensors[name])
            known["state"][index] = {
                part: tensors[f"{part} of {name}"] for part in ("step", "exp_avg", "exp_avg_sq")
            }
        self._optimizer.load_state_dict(known)

    def _states(self) -> Iterator[dict[str, Tensor]]:
        """What the optimizer knows of each step."""
        for step in self._steps.values():
            yield self._optimizer.state[step]
