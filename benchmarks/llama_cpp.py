"""llama.cpp beside us: random models of the same shapes, in its formats, by its own benchmark.

Needs a build of its ``llama-quantize`` and ``llama-bench``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FORMATS = ("Q4_0", "Q2_K")
_FILE_TYPE_F16 = 1


@dataclass
class LlamaCppModel:
    """A model's file, and the tokens a second of each round: of its decoding, and by a prompt's
    length."""

    name: str
    tools: Path
    file: Path
    decoding: list[float] = field(default_factory=list)
    prompts: dict[int, list[float]] = field(default_factory=dict)

    def measure(self, new_tokens: int, prompts: Sequence[int], threads: int) -> None:
        """One round."""
        lengths = ["-p", ",".join(map(str, prompts or [0])), "-n", str(new_tokens)]
        command = [self.tools / "llama-bench", "-m", self.file, "-t", str(threads), "-r", "1"]
        for run in json.loads(_output([*command, *lengths, "-o", "json"])):
            if run["n_gen"]:
                self.decoding.append(run["avg_ts"])
            else:
                self.prompts.setdefault(run["n_prompt"], []).append(run["avg_ts"])

    def row(self, shape: str) -> dict[str, Any]:
        return {
            "shape": shape,
            "contender": self.name,
            "tokens_per_second": statistics.median(self.decoding),
            "tokens_per_second_rounds": self.decoding,
            "prompt_tokens_per_second": {
                length: statistics.median(speeds) for length, speeds in self.prompts.items()
            },
            "weight_bytes": self.file.stat().st_size,
        }


def random_models(
    tools: Path, directory: Path, shape: str, config: Mapping[str, int]
) -> list[LlamaCppModel]:
    """A random model of a Llama's shape in each format, the embedding tied to the head.

    Args:
        tools: the folder of llama.cpp's programs.
        directory: where the models' files go; those that are there are taken as they are.
        config: transformers' names and values of the shape.
    """
    for tool in ("llama-bench", "llama-quantize"):
        if not (tools / tool).is_file():
            raise SystemExit(f"--llama-cpp: {tools} must hold {tool}, and does not.")
    models = []
    source = directory / f"{shape}-f16.gguf"
    for form in FORMATS:
        # llama-quantize takes a name that begins with a format's for that format.
        file = directory / f"{shape}-{form}.gguf"
        if not file.exists():
            if not source.exists():
                _write_random(source, config)
            _output([tools / "llama-quantize", source, file, form])
        models.append(LlamaCppModel(f"llama.cpp {form}", tools, file))
    source.unlink(missing_ok=True)
    return models


def _output(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _write_random(file: Path, config: Mapping[str, int]) -> None:
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, head_size = config["num_key_value_heads"], hidden // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPE_F16)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, (0.02 * values).astype(np.float16))

    add("token_embd.weight", config["vocab_size"], hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, cols in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv_heads * head_size, hidden),
            ("attn_v", kv_heads * head_size, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", middle, hidden),
            ("ffn_up", middle, hidden),
            ("ffn_down", hidden, middle),
        ):
            add(f"blk.{layer}.{name}.weight", rows, cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
