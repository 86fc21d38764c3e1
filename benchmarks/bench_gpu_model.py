"""A random model of Llama-2-7B's shape, dense and compressed: a token, prompts, memory.

    python benchmarks/bench_gpu_model.py --json out.json

Compressed on the device, with few iterations: what a token takes does not depend on how good the
codes are. A token is timed under a graph and eager; there is no key-value cache in either.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import gpu
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nowag_ext

ITERATIONS = 3
PROMPTS = (64, 512, 2048)
NEW_TOKENS = 32
OP = "7B model"
CONFIG: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip


def random_model() -> Any:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (1, count), device="cuda")


def replay_seconds(model: Any) -> float:
    """One token under a graph."""
    ids = tokens(1)
    graph = gpu.capture([lambda: model(input_ids=ids, use_cache=False).logits])
    return gpu.seconds(graph.replay, 20)


def generate_seconds(model: Any, *, graph: bool) -> float:
    """A token of generation from a short prompt, captures included where there is a graph."""
    ids = tokens(16)
    more = {"cache_implementation": "static", "disable_compile": True} if graph else {}

    def generate(count: int) -> None:
        with nowag_ext.decode_graph(model) if graph else nullcontext():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, pad_token_id=0, **more,
            )  # fmt: skip

    generate(4)
    return gpu.seconds(lambda: generate(NEW_TOKENS)) / NEW_TOKENS


def forward_seconds(model: Any, count: int, repeats: int) -> float:
    ids = tokens(count)

    def forward() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    forward()
    return gpu.seconds(forward, repeats)


def measure(model: Any, name: str, results: list[gpu.Line], path: Any) -> None:
    """All times of a model, each printed and written as it comes."""
    jobs = {
        "1 token, eager": lambda: forward_seconds(model, 1, 5),
        "1 token, graph": lambda: replay_seconds(model),
        **{f"prompt of {n}": lambda n=n: forward_seconds(model, n, 3) for n in PROMPTS},
        "generate, a token": lambda: generate_seconds(model, graph=False),
        "generate under graphs, a token": lambda: generate_seconds(model, graph=True),
    }
    dense = {line.shape: line.microseconds for line in results if line.contender == "dense"}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() / 2**30
    for shape, job in jobs.items():
        seconds = gpu.attempt(f"{name}, {shape}", job)
        if seconds is None:
            continue
        line = gpu.Line(OP, shape, name, 1e6 * seconds, 0, 0, notes={"gib_held": held})
        if peer := dense.get(shape):
            line.times_peer, line.peer = peer / line.microseconds, "dense"
        results.append(line)
        gpu.print_lines([line])
        gpu.write(path, results)


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    results: list[gpu.Line] = []
    model = random_model()
    measure(model, "dense", results, options.json)
    act_norms = nowag_ext.calibrate(model, [tokens(512) for _ in range(4)])
    seconds = gpu.seconds(
        lambda: nowag_ext.compress_model(
            model, act_norms, method="vq", d=6, bits=2, iters=ITERATIONS
        )
    )
    results.append(
        gpu.Line(OP, f"compress, {ITERATIONS} iterations", "vq d=6", 1e6 * seconds, 0, 0)
    )
    gpu.print_lines(results[-1:])
    measure(model, "vq d=6", results, options.json)


if __name__ == "__main__":
    main()
