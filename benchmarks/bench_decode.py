"""Decoding one token after another: tokens/s, and where the time of a token goes.

    python benchmarks/bench_decode.py --json benchmarks/results/cpu/decode.json

Randomly initialised models of the shapes of Llama-3.2-1B and SmolLM2-135M, dense and with every
decoder linear a VQLinear of random codes (2 bits, d=2, 4 or 6; 4 bits, d=1), some with a packed
head and embedding too: speed does not depend on what the weights are. All contenders take turns in
one process, and figures are medians of the rounds. In the same rounds the decoder's linears and the
lm_head are timed alone, in the order of a token, so that every weight comes from where it comes
from in a token; the rest is attention, norms and the interpreter. Of the packed linears, the same
pass is timed three ways: the kernel by its addresses, the function around it, which checks and
allocates, and the module.

    python benchmarks/bench_decode.py --shape llama-1b --llama-cpp BUILD/bin --prompts 64 512

also has llama.cpp's own benchmark take its turns (llama_cpp.py), and times prompts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from llama_cpp import LlamaCppModel, random_models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nowag_ext import _cpu, ops
from nowag_ext.decoder import decoder_linears
from nowag_ext.embedding import VQEmbedding, tie_head
from nowag_ext.generate import tokens_per_second
from nowag_ext.linear import VQLinear
from nowag_ext.ops.checks import DTYPES

Form = tuple[int, int]  # d and bits
# By contender, the forms of the decoder's linears and of the head, if that is packed.
FORMS: dict[str, tuple[Form, Form | None]] = {
    "VQ d=4": ((4, 2), None),
    "VQ d=6": ((6, 2), None),
    "VQ d=4, head d=2 4 bits": ((4, 2), (2, 4)),
    "VQ d=2, head d=1 4 bits": ((2, 2), (1, 4)),
    "VQ d=1 4 bits, head too": ((1, 4), (1, 4)),
}
SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip
WORST_ERROR = 2e-3  # of ||y - y'|| / ||y'||, the bound of vq_gemv.h
PASSES = 5  # over the linears, each round

Call = Callable[[], Any]


class NoText:
    """In a tokenizer's place: what a random model says is not text."""

    pad_token_id = 0

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


@dataclass
class Contender:
    """A model, the calls that make up parts of its token, and the seconds of each part."""

    name: str
    model: LlamaForCausalLM
    parts: dict[str, list[Call]]
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def median(self, part: str) -> float:
        return statistics.median(self.seconds[part])


def dense_model(shape: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHAPES[shape], head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def random_vq(linear: nn.Linear, d: int, bits: int) -> VQLinear:
    """Random codes of a weight as large as transformers' random initialisation, std 0.02."""
    rows, cols = linear.weight.shape
    packed = VQLinear(cols, rows, d=d, bits=bits)
    packed.codes.random_(0, 256)
    packed.codebook.normal_()
    packed.row_norms.uniform_(0.01, 0.03)
    packed.col_norms.uniform_(0.5, 1.5)
    return packed


def compressed(dense: LlamaForCausalLM, form: Form, head: Form | None) -> LlamaForCausalLM:
    model = copy.deepcopy(dense)
    for name, linear in decoder_linears(model).items():
        model.set_submodule(name, random_vq(linear, *form))
    for module in packed_linears(model)[:7]:
        validate(module)
    if head is not None:
        pack_head(model, head)
    return model


def pack_head(model: LlamaForCausalLM, form: Form) -> None:
    weight = random_vq(model.lm_head, *form).weight_form()
    dtype = model.dtype
    model.lm_head = VQLinear.from_weight(weight)
    model.model.embed_tokens = VQEmbedding.from_weight(model.model.embed_tokens, weight, dtype)
    tie_head(model, "model.embed_tokens", "lm_head")
    validate(model.lm_head)


def packed_linears(model: LlamaForCausalLM) -> list[VQLinear]:
    """Those of the decoder."""
    return [module for module in model.model.modules() if isinstance(module, VQLinear)]


def tensors(module: VQLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return module.codes, module.codebook, module.row_norms, module.col_norms


def validate(module: VQLinear) -> None:
    x = torch.randn(1, module.in_features)
    want = x.double() @ ops.vq_dequantize(*tensors(module), torch.float32).double().T
    error = float((module(x) - want).norm() / want.norm())
    if not error < WORST_ERROR:
        raise SystemExit(f"relative error {error:.2e}, expected under {WORST_ERROR}")


def contender(name: str, model: LlamaForCausalLM) -> Contender:
    """The model with its parts: each a list of calls on inputs of one token."""
    packed = packed_linears(model)
    linears = packed or list(decoder_linears(model).values())
    inputs = {
        size: torch.randn(1, 1, size, dtype=model.dtype)
        for size in {linear.in_features for linear in linears}
    }
    x = inputs[model.config.hidden_size]
    parts: dict[str, list[Call]] = {"lm_head": [product(model.lm_head, x)]}
    parts["linears"] = [product(linear, inputs[linear.in_features]) for linear in linears]
    if packed:
        parts["kernels"] = [kernel(linear, inputs[linear.in_features]) for linear in packed]
        parts["modules"] = [partial(linear, inputs[linear.in_features]) for linear in packed]
    return Contender(name, model, parts)


def product(linear: nn.Linear | VQLinear, x: Tensor) -> Call:
    if isinstance(linear, VQLinear):
        return partial(ops.run_vq_gemv, x, *tensors(linear))
    return partial(nn.functional.linear, x, linear.weight)


def kernel(linear: VQLinear, x: Tensor) -> Call:
    """The bare kernel: all addresses known, nothing checked, nothing allocated."""
    rows, cols = linear.out_features, linear.in_features
    y = x.new_empty(1, rows)
    launch, addresses = _cpu.vq_gemv, [tensor.data_ptr() for tensor in tensors(linear)]
    arguments = (
        x.data_ptr(), DTYPES[x.dtype], 1, *addresses, 0, rows, cols, linear.d, linear.code_bits,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip

    def call() -> tuple[Tensor, Tensor]:
        launch(*arguments)
        return x, y  # kept alive with the addresses

    return call


def seconds_of(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def contenders(shape: str) -> list[Contender]:
    """Dense and compressed in bf16, and in fp32 where memory holds them all."""
    dense = dense_model(shape)
    models = [("dense bf16", dense)]
    models += [(f"{name} bf16", compressed(dense, *forms)) for name, forms in FORMS.items()]
    if available_memory() > 3 * 4 * dense.num_parameters():
        for name, model in list(models):
            models.append((name.replace("bf16", "fp32"), copy.deepcopy(model).float()))
    else:
        print(f"{shape}: fp32 is left out, there is too little memory")
    return [contender(name, model) for name, model in models]


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(
    entries: list[Contender],
    peers: list[LlamaCppModel],
    rounds: int,
    new_tokens: int,
    prompts: Sequence[int],
) -> None:
    prompt = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(rounds):
        for entry in entries:
            speed = tokens_per_second(entry.model, NoText(), prompt, new_tokens=new_tokens)
            entry.seconds["token"].append(1 / speed)
        for peer in peers:
            peer.measure(new_tokens, prompts, torch.get_num_threads())
        for entry in entries:
            for length in prompts:
                ids = torch.ones(1, length, dtype=torch.int64)
                read = partial(entry.model, ids, logits_to_keep=1)
                entry.seconds[f"prompt of {length}"].append(seconds_of([read]))
        for entry in entries:
            for _ in range(PASSES):
                for part, calls in entry.parts.items():
                    if part != "lm_head":
                        entry.seconds[part].append(seconds_of(calls))
                        entry.seconds["lm_head"].append(seconds_of(entry.parts["lm_head"]))


def weight_bytes(model: nn.Module) -> int:
    """What a token reads: every weight, the embeddings once, as the lm_head."""
    return sum(parameter.nbytes for parameter in model.parameters())


def row(
    shape: str,
    entry: Contender,
    entries: list[Contender],
    peers: list[LlamaCppModel],
    prompts: Sequence[int],
    read_gb_s: float,
) -> dict[str, Any]:
    token, head, linears = (entry.median(part) for part in ("token", "lm_head", "linears"))
    found: dict[str, Any] = {
        "shape": shape, "contender": entry.name, "tokens_per_second": 1 / token,
        "tokens_per_second_rounds": [1 / seconds for seconds in entry.seconds["token"]],
        "ms_a_token": {
            "lm_head": 1e3 * head, "linears": 1e3 * linears, "rest": 1e3 * (token - head - linears)
        },
        "prompt_tokens_per_second": {
            length: length / entry.median(f"prompt of {length}") for length in prompts
        },
        "weight_bytes": weight_bytes(entry.model),
        "read_percent": 100 * weight_bytes(entry.model) / token / 1e9 / read_gb_s,
        "ratios": {
            peer.name: peer.median("token") / token
            for peer in entries if peer.name.startswith("dense") and peer is not entry
        },
    }  # fmt: skip
    for peer in peers:
        found["ratios"][peer.name] = 1 / token / statistics.median(peer.decoding)
    if "kernels" in entry.parts:
        count = len(entry.parts["kernels"])
        kernels, modules = entry.median("kernels"), entry.median("modules")
        found["linears"] = count
        found["us_a_linear"] = {
            "kernel": 1e6 * kernels / count,
            "checks, allocation": 1e6 * (linears - kernels) / count,
            "module": 1e6 * (modules - linears) / count,
        }
    return found


def show(found: dict[str, Any]) -> None:
    token = 1e3 / found["tokens_per_second"]
    parts = [f"{found['tokens_per_second']:7.2f} tokens/s"]
    parts += [
        f"{speed:.1f} of a prompt of {length}"
        for length, speed in found["prompt_tokens_per_second"].items()
    ]
    parts.append(f"{found['weight_bytes'] / 2**20:.0f} MiB")
    if "ms_a_token" in found:
        parts.append(f"{found['read_percent']:.0f} % of read bandwidth; ms a token {token:.2f}")
        parts += [f"{part} {ms:.2f} ({ms / token:.0%})" for part, ms in found["ms_a_token"].items()]
        parts += [f"{ratio:.2f}x {peer}" for peer, ratio in found["ratios"].items()]
    print(f"{found['shape']:>9} {found['contender']:<28} {', '.join(parts)}", flush=True)
    if "us_a_linear" in found:
        us = ", ".join(f"{part} {us:.1f}" for part, us in found["us_a_linear"].items())
        print(f"{'':>22} {found['linears']} linears, us each: {us}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="one of the shapes alone")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens a round")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="lengths, to time too")
    parser.add_argument("--llama-cpp", type=Path, help="the folder of llama-bench, to run too")
    parser.add_argument("--keep", type=Path, help="a folder that keeps llama.cpp's models")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = harness.Report("decode")
    with torch.inference_mode(), ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep.mkdir(parents=True, exist_ok=True)
        for shape in [options.shape] if options.shape else SHAPES:
            peers = []
            if options.llama_cpp:
                peers = random_models(options.llama_cpp, keep, shape, SHAPES[shape])
            # As ones that are loaded: by weights that are inference tensors torch multiplies the
            # last token of a prompt, a slice, 70 times as slowly in bfloat16 (2.13).
            with torch.inference_mode(False), torch.no_grad():
                entries = contenders(shape)
            measure(entries, peers, options.rounds, options.new_tokens, options.prompts)
            read = report.ceilings["read_gb_s"]
            report.rows += [
                row(shape, entry, entries, peers, options.prompts, read) for entry in entries
            ]
            report.rows += [peer.row(shape) for peer in peers]
            for found in report.rows[-len(entries) - len(peers) :]:
                show(found)
            del entries
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
