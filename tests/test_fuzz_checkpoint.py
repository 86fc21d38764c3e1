"""Damaged checkpoints: each loads and runs, or is refused in words. Nothing crashes or hangs.

`python tests/test_fuzz_checkpoint.py SEED` runs one case again and shows what came of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import nowag_ext
from nowag_ext.decoder import decoder_linears, vocabulary_size
from nowag_ext.integrations import transformers as quantizer

CASES, CHUNK = 2050, 50  # the first chunk in the plain suite, the others under the sanitizers
SECONDS = 60  # a case takes a fraction of one
VERSION_1 = Path(__file__).parent / "data"
VOCABULARY = 64

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 8, 9, 16, 17, 64, 2**20, 2**31, 2**40, 2**63, 10**30,
    0.0, 0.5, 1.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x", "4", "2:4", "0:0",
    "1:99999999", "../x", "/x", "x.safetensors", "float64", "int32", "nowag", "gptq", "forward",
    "model.layers.0.mlp.up_proj", "model", "lm_head", "é\u0000", "a" * 5000, [], {}, [[]], [1, "2"],
    {"a": {"b": []}}, [0] * 3000,
]  # fmt: skip


def deep(levels: int, kind: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = kind(value)
    return value


# --- what is damaged ------------------------------------------------------------------------------


def tiny(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **more)).eval()


def make_sources(folder: Path) -> list[Path]:
    """Checkpoints of every form: both versions, every method, shards, a shared codebook, a head."""
    names = ["mixed", "shared", "head", "v1_vq", "v1_prune"]
    model = tiny()
    norms = {n: torch.ones(linear.in_features) for n, linear in decoder_linears(model).items()}
    others = {"down_proj": {"method": "prune"}, "o_proj": {"method": "prune", "pattern": "2:4"}}
    nowag_ext.compress_model(model, norms, d=3, bits=1, iters=1, overrides=others)
    nowag_ext.save_compressed(model, None, folder / "mixed")
    model = tiny()
    tokens = torch.arange(16).view(2, 8)
    nowag_ext.compress(model, tokens, d=4, bits=1.5, iters=1, overrides=others)
    nowag_ext.save_compressed(model, None, folder / "shared", max_shard_size="20KB")
    model = tiny(tie_word_embeddings=True)
    nowag_ext.compress(model, tokens, d=4, bits=1.5, iters=1, head={"d": 2, "bits": 3})
    nowag_ext.save_compressed(model, None, folder / "head")
    for name in names[3:]:
        shutil.copytree(VERSION_1 / name, folder / name)
    return [folder / name for name in names]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within a value, with every key of it."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damage_json(content: Any, dice: random.Random) -> str:
    """Changes one value in place, and says which."""
    found = list(places(content))
    fields = [place for place in found if isinstance(place[0], dict)]
    container, key = dice.choice(fields if dice.random() < 0.7 else found)
    old = container[key]
    new: Any
    match dice.randrange(8):
        case 0:
            del container[key]
            return f"no {key!r}"
        case 1:
            new = [old]
        case 2 if isinstance(old, int):
            new = old + dice.choice([-1, 1, 64, -64])
        case 3:
            new = deep(dice.choice([5, 40, 300]), dice.choice([lambda v: [v], lambda v: {"a": v}]))
        case 4 if isinstance(container, dict):
            container[dice.choice(["", "x", "self", "d", "sparsity", "groups"])] = old
            return f"{key!r} again"
        case 5:
            new = container[dice.choice(list(container))] if isinstance(container, dict) else old
        case _:
            new = dice.choice(VALUES)
    container[key] = new
    return f"{key!r}: {new!s:.80}"


def damage_config(folder: Path, dice: random.Random) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    target = config["quantization_config"] if dice.random() < 0.7 else config
    what = damage_json(target, dice)
    file.write_text(json.dumps(config))
    return f"config.json: {what}"


def damage_index(folder: Path, dice: random.Random) -> str:
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return damage_tensors(folder, dice)
    index = json.loads(file.read_text())
    what = damage_json(index, dice)
    file.write_text(json.dumps(index))
    return f"index: {what}"


def damage_header(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(folder.glob("*.safetensors")))
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if dice.random() < 0.5:
        name = dice.choice([name for name in header if name != "__metadata__"])
        dtypes = ["I8", "U8", "I32", "F16", "F32", "F64", "BF16", "BOOL", "F8_E4M3", "I64", "X", 3]
        match dice.randrange(4):
            case 0:
                header[name]["dtype"] = what = dice.choice(dtypes)
            case 1:
                header[name]["shape"] = what = header[name]["shape"][::-1]
            case 2:
                other = dice.choice([name for name in header if name != "__metadata__"])
                header[name], header[other] = header[other], header[name]
                what = f"as {other}"
            case _:
                header[f"{name}.x"] = header.pop(name)
                what = "renamed"
        what = f"{name} {what}"
    else:
        what = damage_json(header, dice)
    text = json.dumps(header).encode()
    size = len(text) + (dice.choice([-1, 1, 2**40]) if dice.random() < 0.1 else 0)
    file.write_bytes(struct.pack("<Q", size % 2**63) + text + content[8 + length :])
    return f"{file.name}: header: {what}"


def damage_tensors(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = dice.choice([name for name in header if name != "__metadata__"])
    begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
    match dice.randrange(4):
        case 0:
            for _ in range(dice.choice([1, 10])):
                content[dice.randrange(begin, end)] ^= 1 << dice.randrange(8)
        case 1:
            content[begin:end] = bytes([dice.choice([0, 0x7F, 0x80, 0xFF])]) * (end - begin)
        case 2:
            content[begin:end] = dice.randbytes(end - begin)
        case _:
            place = dice.randrange(begin, end)
            content[place : place + 8] = dice.randbytes(8)
    file.write_bytes(content)
    return f"{file.name}: content of {name}"


def damage_file(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(file for file in folder.iterdir() if file.suffix != ".csv"))
    content = file.read_bytes()
    match dice.randrange(3):
        case 0:
            file.write_bytes(content[: dice.randrange(len(content))])
        case 1:
            place = dice.randrange(len(content))
            file.write_bytes(content[:place] + dice.randbytes(4) + content[place + 4 :])
        case _:
            file.unlink()
            if dice.random() < 0.5:
                file.mkdir()
    return f"{file.name} as a whole"


# How often each is done; in this order, so that none needs what another has broken.
DAMAGES = {
    damage_tensors: 3, damage_index: 1, damage_header: 2, damage_config: 3, damage_file: 1,
}  # fmt: skip


# --- what comes of it -----------------------------------------------------------------------------


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def late(*_args: Any) -> None:
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(seed: int, sources: list[Path], folder: Path) -> str:
    """Damages a checkpoint, loads and runs it; what came of it, if that is one of what may.

    The search for weights that the model's code reads looks at no content, and takes half the time.
    """
    dice = random.Random(seed)
    source = dice.choice(sources)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    kinds = dice.choices(list(DAMAGES), list(DAMAGES.values()), k=dice.choice([1, 1, 1, 2]))
    damages = [damage(folder, dice) for damage in DAMAGES if damage in kinds]
    what = f"seed {seed}, {source.name}, {'; '.join(damages)}"
    try:
        with no_longer_than(SECONDS), torch.no_grad():
            try:
                with mock.patch.object(quantizer, "weight_readers", return_value=[]):
                    model = nowag_ext.load(folder)
            except (ValueError, OSError) as error:
                return f"{what}: {type(error).__name__}: {error}"
            vocabulary = vocabulary_size(model)
            for length in (1, 40):  # one goes through the kernels for few tokens
                model(torch.arange(length)[None] % vocabulary)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return f"{what}: works"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(50)
    yield make_sources(tmp_path_factory.mktemp("sources"))
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.fuzz] if n else []) for n in range(0, CASES, CHUNK)],
)
def test_damaged_checkpoints(first: int, sources: list[Path], tmp_path: Path) -> None:
    outcomes = [run_case(seed, sources, tmp_path / "x") for seed in range(first, first + CHUNK)]
    working = sum(outcome.endswith(": works") for outcome in outcomes)
    assert 0 < working < CHUNK


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        for seed in map(int, sys.argv[1:]):
            made = make_sources(Path(place) / str(seed))
            print(run_case(seed, made, Path(place) / "x"))
