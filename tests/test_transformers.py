"""The quantizer: save_pretrained and from_pretrained, dtypes, devices, and damaged checkpoints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from fresh_process import fresh_python
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    LINEARS,
    logits,
    random_act_norms,
    tiny_config,
    tiny_model,
    tiny_tokens,
)
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import nowag_ext
from nowag_ext import SparseLinear, VQLinear, compress_model

METHODS: dict[str, dict[str, Any]] = {
    "vq": {"method": "vq", "d": 4, "bits": 1.5, "iters": 5},
    "vq-padded": {"method": "vq", "d": 3, "bits": 4 / 3, "iters": 5},
    "half": {"method": "prune"},
    "2:4": {"method": "prune", "pattern": "2:4"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UP = "model.layers.1.mlp.up_proj"


def compressed(
    name: str = "vq", architecture: str = "llama", dtype: torch.dtype = torch.float32
) -> Any:
    model = tiny_model(architecture, dtype)
    return compress_model(model, random_act_norms(model), **METHODS[name])


def packed_modules(model: Any) -> dict[str, Any]:
    kinds = (VQLinear, SparseLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def assert_same_model(one: Any, two: Any) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_reloaded_model_is_the_same_bit_for_bit(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = compressed(method, dtype=dtype)
    assert len(packed_modules(model)) == LINEARS
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_model(model, loaded)


@pytest.mark.parametrize("method", ["vq", "half"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, method: str, tmp_path: Path) -> None:
    model = compressed(method, architecture)
    model.save_pretrained(tmp_path)
    loaded = nowag_ext.load(tmp_path)
    assert_same_model(model, loaded)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    prompt = tiny_tokens(1, 5)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **greedy), loaded.generate(prompt, **greedy))


def test_shards_and_a_second_save(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    loaded = nowag_ext.load(tmp_path / "one")
    assert_same_model(model, loaded)
    loaded.save_pretrained(tmp_path / "two")
    assert_same_model(model, nowag_ext.load(tmp_path / "two"))


@pytest.mark.parametrize("asked", [*DTYPES, "auto"])
@pytest.mark.parametrize("method", ["vq", "2:4"])
def test_packed_tensors_keep_their_dtypes(
    method: str, asked: torch.dtype | str, tmp_path: Path
) -> None:
    model = compressed(method, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = nowag_ext.load(tmp_path, dtype=asked, device_map="cpu")
    rest = torch.bfloat16 if asked == "auto" else asked
    packed = set()
    for name, module in packed_modules(model).items():
        for part, tensor in module.packed_parameters().items():
            found = loaded.get_parameter(f"{name}.{part}")
            assert torch.equal(tensor, found)
            assert not found.requires_grad
            packed.add(f"{name}.{part}")
    assert {p.dtype for name, p in loaded.named_parameters() if name not in packed} == {rest}
    assert logits(loaded).dtype == rest
    torch.testing.assert_close(logits(loaded).float(), logits(model).float(), rtol=0.1, atol=0.2)


def test_loads_in_a_fresh_process_after_the_import(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    script = (
        "import sys, torch, nowag_ext\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad(): got = model(tokens).logits\n"
        "assert torch.equal(got, torch.load(sys.argv[1] + '/logits.pt'))\n"
    )
    tokens = str(tiny_tokens().tolist())
    subprocess.run(**fresh_python("-c", script, tmp_path, tokens), check=True, timeout=120)


def test_body_without_its_head(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert len(packed_modules(body)) == LINEARS
    with torch.no_grad():
        want = model.model(tiny_tokens()).last_hidden_state
        assert torch.equal(body(tiny_tokens()).last_hidden_state, want)


def test_heads_are_fresh_as_of_a_dense_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    compressed().save_pretrained(tmp_path / "packed")
    for kind, labels in (
        (AutoModelForSequenceClassification, {"num_labels": 3}),
        (AutoModelForTokenClassification, {}),
        (AutoModel, {}),
        (AutoModelForCausalLM, {}),
    ):
        infos = []
        for name in ("dense", "packed"):
            model, info = kind.from_pretrained(tmp_path / name, output_loading_info=True, **labels)
            infos.append(info)
        assert infos[0] == infos[1], kind
        assert len(packed_modules(model)) == LINEARS
    assert infos[0]["missing_keys"] == set()


def test_a_classifier_that_was_compressed(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "dense", num_labels=3, pad_token_id=0)
    compress_model(model, random_act_norms(model), "prune")
    model.save_pretrained(tmp_path / "packed")
    again = kind.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert info["unexpected_keys"] == {"score.weight"}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older transformers give a quantised model the head that is stored, whatever its size",
)
def test_a_head_of_another_size(tmp_path: Path) -> None:
    kind = AutoModelForSequenceClassification
    model = kind.from_config(tiny_config(), dtype=torch.float32)
    compress_model(model, random_act_norms(model), "prune")
    model.save_pretrained(tmp_path)
    other, info = kind.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert other.score.weight.shape[0] == 3
    assert {key[0] for key in info["mismatched_keys"]} == {"score.weight"}


def test_a_body_gets_a_head(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path / "dense")
    body = AutoModel.from_pretrained(tmp_path / "dense")
    compress_model(body, random_act_norms(body), **METHODS["vq"])
    body.save_pretrained(tmp_path / "packed")
    loaded = nowag_ext.load(tmp_path / "packed")
    assert len(packed_modules(loaded)) == LINEARS
    assert torch.equal(loaded.model.embed_tokens.weight, body.embed_tokens.weight)


def test_ignored_linears_stay_dense(tmp_path: Path) -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune", ["o_proj", r"re:layers\.0\..*down"])
    model.save_pretrained(tmp_path)
    loaded = nowag_ext.load(tmp_path)
    assert_same_model(model, loaded)
    assert type(loaded.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(loaded.model.layers[1].self_attn.o_proj) is nn.Linear
    assert type(loaded.model.layers[1].mlp.down_proj) is SparseLinear


def test_dequantize_gives_an_ordinary_model(tmp_path: Path) -> None:
    model = compressed()
    packed = packed_modules(model)
    model.save_pretrained(tmp_path / "packed")
    dense = nowag_ext.load(tmp_path / "packed").dequantize()
    for name, module in packed.items():
        linear = dense.get_submodule(name)
        assert torch.equal(linear.weight, module.weight_form().dequantize(torch.float32))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense),
        rtol=0, atol=0,
    )  # fmt: skip


def test_disk_offload_is_refused(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        nowag_ext.load(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


# --- damaged checkpoints --------------------------------------------------------------------------

Damage = Callable[[dict[str, Tensor]], None]


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def _nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = float("nan")
    return tensor


def _bumped(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1] += 1
    return tensor


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "no codes": (
        "vq", lambda t: t.pop(f"{UP}.codes"), rf"incomplete: it has no tensor {UP}\.codes\."
    ),
    "no norms": (
        "vq",
        lambda t: (t.pop(f"{UP}.row_norms"), t.pop(f"{UP}.col_norms")),
        rf"no tensor {UP}\.row_norms and 1 more",
    ),
    "no bias": (
        "vq",
        lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"),
        r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "no embedding": (
        "vq", lambda t: t.pop("model.embed_tokens.weight"), r"no tensor model\.embed_tokens\.weight"
    ),
    "codes too short": (
        "vq", _set(f"{UP}.codes", lambda t: t[:, :-1]), rf"{UP}\.codes in .* has shape .*asks for"
    ),
    "codes past a short codebook": (
        "vq", _set(f"{UP}.codebook", lambda t: t[:7]), rf"{UP}\.codebook in .*shape \(7, 4\)"
    ),
    "dense norm of wrong shape": (
        "vq", _set("model.norm.weight", lambda t: t[:5]), r"model\.norm\.weight in .*shape \(5,\)"
    ),
    "codes of another dtype": (
        "vq", _set(f"{UP}.codes", lambda t: t.int()), rf"{UP}\.codes in .* is I32, but .* U8"
    ),
    "norms in fp32": (
        "vq", _set(f"{UP}.row_norms", lambda t: t.float()), rf"{UP}\..* is F32, but .* F16"
    ),
    "NaN in the codebook": (
        "vq", _set(f"{UP}.codebook", _nan), rf"{UP} .* damaged: codebook must be finite, but 1"
    ),
    "NaN in values": ("half", _set(f"{UP}.values", _nan), rf"{UP} .* values must be finite, but 1"),
    "fewer values": (
        "half", _set(f"{UP}.values", lambda t: t[:-1]), rf"{UP}\.values in .* has shape"
    ),
    "offsets that do not fit": (
        "half", _set(f"{UP}.row_offsets", _bumped), rf"{UP} .* row_offsets must be the running"
    ),
    "integers for values": (
        "half", _set(f"{UP}.values", lambda t: t.int()), rf"{UP}\.values in .* is I32, but .* F32"
    ),
    "integers for a bias": (
        "vq",
        _set("model.layers.0.self_attn.q_proj.bias", lambda t: t.int()),
        r"q_proj\.bias in .* is I32, but a floating-point dtype must be there",
    ),
    "integers for a norm": (
        "vq", _set("model.norm.weight", lambda t: t.to(torch.int8)), r"model\.norm\.weight .* I8,"
    ),
    "NaN in the embedding": (
        "vq", _set("model.embed_tokens.weight", _nan),
        r"model\.embed_tokens\.weight in the checkpoint is damaged: it holds a NaN",
    ),
    "bits past the inputs": (
        "2:4",
        _set("model.layers.0.mlp.down_proj.bitmap", lambda t: t | 0x80),
        r"layers\.0\.mlp\.down_proj in the checkpoint is damaged: bitmap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_refused(name: str, tmp_path: Path) -> None:
    method, damage, sentence = DAMAGES[name]
    compressed(method).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        nowag_ext.load(tmp_path)


def test_mismatches_cannot_be_ignored(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    _set(f"{UP}.codes", lambda t: t[1:])(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{UP}\.codes in .* has shape"):
        nowag_ext.load(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_files_are_refused(kept: int, tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        nowag_ext.load(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(OSError, match="model-00002-of"):
        nowag_ext.load(tmp_path)


VQ_GROUP = {"method": "vq", "modules": [UP], "d": 4, "code_bits": 6, "weight_dtype": "float32"}
PRUNE_GROUP = {"method": "prune", "modules": [UP], "sparsity": 0.5, "weight_dtype": "float32"}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "future": ({"format_version": 3, "nowag_ext": "7.0"}, r"format_version 3, written by .* 7\.0"),
    "method": ({"groups": [{"method": "magic"}]}, "must be vq or prune, not 'magic'"),
    "no group": ({"groups": ["all"]}, "a group of quantization_config must be an object"),
    "fields": (
        {"groups": [{"method": "vq", "modules": [], "d": 4}]},
        r"groups\[0\] of config\.json is malformed",
    ),
    "no list": ({"groups": 3}, r"groups of config\.json must be a list"),
    "fractional version": ({"format_version": 2.0}, r"has format_version 2\.0, written"),
    "release": ({"nowag_ext": ["0.1"]}, r"quantization_config\.nowag_ext of config\.json must be"),
    "no modules": (
        {"groups": [VQ_GROUP | {"modules": {}}]}, r"modules in .*groups\[0\] of .* must be a list"
    ),
    "twice": (
        {"groups": [VQ_GROUP, VQ_GROUP]}, rf"groups\[1\] of config\.json names {UP}, as does"
    ),
    "dtype": (
        {"groups": [VQ_GROUP | {"weight_dtype": "int8"}]}, r"weight_dtype in .* one of .* 'int8'"
    ),
    "settings": (
        {"groups": [VQ_GROUP | {"settings": {"bits": [[2]]}}]}, r"settings in .* number or a string"
    ),
    "list for d": ({"groups": [VQ_GROUP | {"d": [4]}]}, r"d in .*groups\[0\] .* cannot be \[4\]"),
    "sparsity": (
        {"groups": [PRUNE_GROUP | {"sparsity": "0.5"}]}, r"\[0\].*: sparsity must be a number"
    ),
    "infinite sparsity": (
        {"groups": [PRUNE_GROUP | {"sparsity": 1e308}]}, r"\[0\].*: sparsity must be in \[0, 1\)"
    ),
    "tied": (
        {"groups": [PRUNE_GROUP | {"modules": ["lm_head"]}]}, r"lm_head of .* shares its weight"
    ),
    "unknown module": (
        {"groups": [{"method": "vq", "modules": ["model.nowhere"], "d": 4, "code_bits": 6,
                     "weight_dtype": "float32"}]},
        r"model\.nowhere of quantization_config is no module of this LlamaForCausalLM",
    ),
    "no linear": (
        {"groups": [{"method": "vq", "modules": ["model.norm"], "d": 4, "code_bits": 6,
                     "weight_dtype": "float32"}]},
        r"model\.norm of quantization_config is a LlamaRMSNorm",
    ),
    "d": (
        {"groups": [{"method": "vq", "modules": [UP], "d": 9, "code_bits": 9,
                     "weight_dtype": "float32"}]},
        r"groups\[0\] of config\.json: d must be an integer from 1 to 8, not 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_unfit_configurations_are_refused(name: str, tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    change, sentence = CONFIGS[name]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        nowag_ext.load(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_offload_to_the_cpu(method: str) -> None:
    model = compressed(method)
    want = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for module in packed_modules(model).values():
        assert all(parameter.is_meta for parameter in module.packed_parameters().values())
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("method", METHODS)
def test_optimizers_and_gradients_leave_packed_tensors_alone(method: str) -> None:
    model = compressed(method)
    packed = {id(p) for m in packed_modules(model).values() for p in m.packed_parameters().values()}
    before = [p.clone() for p in model.parameters() if id(p) in packed]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(tiny_tokens(), labels=tiny_tokens()).loss.backward()
    optimizer.step()
    after = [p for p in model.parameters() if id(p) in packed]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
