"""benchmarks/llama_cpp.py with programs that stand for llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from llama_cpp import FORMATS, random_models

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BENCH = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
echo '[{"n_prompt": 7, "n_gen": 0, "avg_ts": 80.5}, {"n_prompt": 0, "n_gen": 5, "avg_ts": 20.5}]'
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, text in {"llama-quantize": '#!/bin/sh\ncp "$1" "$2"\n', "llama-bench": BENCH}.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def test_models_and_rounds(tools: Path, tmp_path: Path) -> None:
    models = random_models(tools, tmp_path, "tiny", SHAPE)
    assert [model.name for model in models] == [f"llama.cpp {form}" for form in FORMATS]
    assert not (tmp_path / "tiny-f16.gguf").exists()
    reader: Any = gguf.GGUFReader(models[0].file)
    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == [40, 32]
    assert shapes["blk.1.attn_k.weight"] == [16, 32]
    assert shapes["blk.1.ffn_down.weight"] == [32, 48]
    assert len(shapes) == 2 + 2 * 9
    for _ in range(3):
        models[0].measure(5, [7], 2)
    row = models[0].row("tiny")
    assert row["tokens_per_second"] == 20.5
    assert row["tokens_per_second_rounds"] == [20.5] * 3
    assert row["prompt_tokens_per_second"] == {7: 80.5}
    call = (tools / "calls").read_text().splitlines()[0]
    assert call == f"-m {models[0].file} -t 2 -r 1 -p 7 -n 5 -o json"


def test_programs_that_are_missing_or_fail(tools: Path, tmp_path: Path) -> None:
    (tools / "llama-quantize").write_text("#!/bin/sh\necho no such format >&2\nexit 3\n")
    with pytest.raises(SystemExit, match="no such format"):
        random_models(tools, tmp_path, "tiny", SHAPE)
    (tools / "llama-bench").unlink()
    with pytest.raises(SystemExit, match="must hold llama-bench, and does not"):
        random_models(tools, tmp_path, "tiny", SHAPE)
