"""Saving and loading whole models: atomic directories, size, the model card, dense form, GGUF."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_process import fresh_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import logits, random_act_norms, tiny_config, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import nowag_ext
from nowag_ext import ModelReport, compress_model, load_dense_model, save_compressed, save_dense
from nowag_ext.files import atomic_directory, atomic_file

VQ = {"d": 4, "bits": 1.5, "iters": 4}


def compressed(method: str = "prune", **settings: Any) -> Any:
    model = tiny_model()
    return compress_model(model, random_act_norms(model), method, **settings)


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(97 + index): index for index in range(26)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), eos_token="z"
    )


def test_a_saved_directory_holds_all_there_is(tmp_path: Path) -> None:
    model = compressed("vq", **VQ)
    model.generation_config.max_new_tokens = 7
    save_compressed(model, tiny_tokenizer(), tmp_path / "deep" / "model")
    path = tmp_path / "deep" / "model"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    assert ModelReport.from_json((path / "report.json").read_text()) == model.nowag_report
    assert (path / "layers.csv").read_text() == model.nowag_report.to_csv()
    loaded = nowag_ext.load(path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.max_new_tokens == 7
    tokenizer = nowag_ext.checkpoint.load_tokenizer(path)
    assert tokenizer("abz")["input_ids"] == [0, 1, 25]


@pytest.mark.parametrize(
    ("method", "settings"),
    [("vq", VQ), ("vq", {"d": 6, "bits": 1, "iters": 3}), ("prune", {}),
     ("prune", {"pattern": "2:4"})],
)  # fmt: skip
def test_bytes_on_disk_are_what_bits_per_weight_says(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = compressed(method, **settings)
    save_compressed(model, None, tmp_path / "model", max_shard_size="40KB")
    report = model.nowag_report
    names = {layer.name for layer in report.layers}
    on_disk = 0
    for file in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                module, _, part = name.rpartition(".")
                if module in names and part != "bias":
                    on_disk += opened.get_tensor(name).nbytes
    assert on_disk == pytest.approx(
        report.bits_per_weight * report.compressed_weights / 8, rel=0.01
    )


def test_the_model_card_opens_with_the_import(tmp_path: Path) -> None:
    save_compressed(compressed(), None, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    shown = card.split("---\n", 2)[2].strip().splitlines()
    assert shown[0] == "```python"
    assert shown[1].startswith("import nowag_ext")
    assert "nowag_ext.load(" in card
    assert str(tmp_path) not in card


def test_dense_form_loads_without_this_package(tmp_path: Path) -> None:
    model = compressed("vq", **VQ)
    with torch.no_grad():
        packed = logits(model)
    save_dense(model, None, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'nowag_ext' not in sys.modules\n"
        "with torch.no_grad(): got = model(torch.tensor(eval(sys.argv[2]))).logits\n"
        "torch.save(got, sys.argv[1] + '/logits.pt')\n"
    )
    arguments = [str(tmp_path / "dense"), str(tiny_tokens().tolist())]
    subprocess.run(**fresh_python("-c", script, *arguments), check=True, timeout=120)
    got = torch.load(tmp_path / "dense" / "logits.pt")
    assert torch.equal(got, logits(model))
    torch.testing.assert_close(got, packed, rtol=1e-3, atol=1e-3)


def test_dense_weights_take_the_dtype_of_the_rest(tmp_path: Path) -> None:
    save_compressed(compressed(), None, tmp_path / "packed")
    model = nowag_ext.load(tmp_path / "packed", dtype=torch.bfloat16)
    save_dense(model, None, tmp_path / "dense")
    loaded, tokenizer = load_dense_model(tmp_path / "dense")
    assert tokenizer is None
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


# --- all or nothing -------------------------------------------------------------------------------


def test_does_not_overwrite_unless_told(tmp_path: Path) -> None:
    model = compressed()
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_compressed(model, None, target)
    assert [entry.name for entry in target.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match=r"thesis\.tex in it was not written by nowag_ext"):
        save_compressed(model, None, target, overwrite=True)
    (target / "thesis.tex").unlink()
    save_compressed(compressed("vq", d=4, bits=1, iters=2), None, target)
    save_compressed(model, None, target, overwrite=True)
    assert torch.equal(logits(nowag_ext.load(target)), logits(model))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_compressed(compressed(), None, tmp_path / "model")
    assert nowag_ext.load(tmp_path / "model") is not None


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("text")
    with pytest.raises(FileExistsError, match="is a file: a directory is needed"):
        save_compressed(compressed(), None, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "text"


def test_too_little_room_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OSError, match=r"MB are needed but the disk has 0\.0 MB free"):
        save_compressed(compressed(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed()

    def failing(directory: Path, **_kwargs: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", failing)
    with pytest.raises(OSError, match="the disk is full: nothing was written") as caught:
        save_compressed(model, None, tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed()
    save_compressed(model, None, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def interrupted(directory: Path, **_kwargs: Any) -> None:
        (Path(directory) / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_compressed(model, None, tmp_path / "model", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == before


def test_atomic_files_and_directories(tmp_path: Path) -> None:
    target = tmp_path / "statistics"
    with atomic_file(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(UnicodeEncodeError), atomic_file(target) as temporary:
        temporary.write_text("two\ud800", encoding="utf-8")
    assert target.read_text() == "one"
    with atomic_directory(tmp_path / "made") as directory:
        (directory / "file").write_text("text")
        (directory / "file").chmod(0o600)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["made", "statistics"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "made" / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~umask


# --- what load refuses ----------------------------------------------------------------------------


def test_load_refuses_other_models(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is not a checkpoint compressed by nowag_ext"):
        nowag_ext.load(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        nowag_ext.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        nowag_ext.load(tmp_path / "empty")
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is truncated or damaged"):
        nowag_ext.load(tmp_path / "dense")


def test_only_compressed_models_are_saved_as_such(tmp_path: Path) -> None:
    for save in (save_compressed, save_dense):
        with pytest.raises(ValueError, match="the model is not compressed"):
            save(tiny_model(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- dense models, GGUF among them ----------------------------------------------------------------


def test_dense_models_are_loaded_with_their_tokenizer(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_dense_model(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer("ab")["input_ids"] == [0, 1]
    assert load_dense_model(tmp_path, torch.float32)[0].dtype == torch.float32


def test_a_compressed_model_is_not_dense(tmp_path: Path) -> None:
    save_compressed(compressed(), None, tmp_path / "model")
    with pytest.raises(ValueError, match="is already quantised"):
        load_dense_model(tmp_path / "model")


def write_gguf(path: Path, model: Any) -> None:
    """A llama model and a byte tokenizer as GGUF, its matrices in 8-bit blocks."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", "t", "1"]
    tokens += [f"t{index}" for index in range(1, config.vocab_size - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("model.layers.", "blk.")
        array = tensor.float().numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = array.shape[0] // 16
            array = array.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2:
            blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_model() -> Any:
    config = tiny_config()
    config.attention_bias = False
    config.intermediate_size = 96  # whole blocks of 32
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_gguf_files_are_loaded_compressed_and_saved(tmp_path: Path) -> None:
    dense = gguf_model()
    file = tmp_path / "tiny-q8.gguf"
    write_gguf(file, dense)
    model, tokenizer = load_dense_model(file)
    assert model.dtype == torch.float32
    assert tokenizer is not None
    assert len(tokenizer) == dense.config.vocab_size
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.5)
    compress_model(model, random_act_norms(model), "prune")
    save_compressed(model, tokenizer, tmp_path / "model")
    assert torch.equal(logits(nowag_ext.load(tmp_path / "model")), logits(model))
    save_dense(model, tokenizer, tmp_path / "dense")
    again, _ = load_dense_model(tmp_path / "dense", torch.bfloat16)
    assert again.dtype == torch.bfloat16


def test_an_incomplete_dense_model_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: it has no tensor .*0\.mlp\.up_proj\.weight"):
        load_dense_model(tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_gguf_files_are_refused(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, gguf_model())
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"tiny\.gguf is damaged"):
        load_dense_model(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"GGUF\x03\x00\x00\x00"])
def test_damaged_gguf_files_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf is (not a GGUF file|damaged)"):
        load_dense_model(file)
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        load_dense_model(tmp_path / "missing.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizes_as_a_whole_after_saving_and_loading(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    compress_model(model, random_act_norms(model), d=4, bits=1.5, iters=2)
    save_compressed(model, None, tmp_path / "one")
    for one in (model, nowag_ext.load(tmp_path / "one")):
        dense = one.dequantize(dtype=dtype)
        assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
        assert logits(dense).dtype == dtype
        dense.save_pretrained(tmp_path / "dense")


def test_dequantizes_after_saving(tmp_path: Path) -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), d=4, bits=1.5, iters=2)
    save_compressed(model, None, tmp_path / "one")
    want = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), want, rtol=1e-3, atol=1e-3)
