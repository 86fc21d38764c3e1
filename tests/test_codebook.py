"""Codebooks that linears share: one layer, a whole model, and all that happens to modules."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LINEARS, logits, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import nowag_ext
from nowag_ext import Codebook, VQLinear, VQWeight, ops, reference, vq_compress
from nowag_ext.codebook import OWNER, adopt_codebooks
from nowag_ext.decoder import decoder_linears
from nowag_ext.groups import format_group
from nowag_ext.integrations.transformers import NowagConfig, attach
from nowag_ext.methods import VQSettings, packed_linear
from nowag_ext.normalize import normalize_weight

D, CODE_BITS = 4, 6
STORED = f"model.{OWNER}"


def random_codebook(name: str = "model", seed: int = 5) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    return Codebook(torch.randn(2**CODE_BITS, D, generator=generator), name)


def compress(weight: Tensor, act_norms: Tensor, codebook: Codebook) -> VQWeight:
    return vq_compress(weight, act_norms, d=D, bits=CODE_BITS / D, codebook=codebook)


def shared_model(scope: Callable[[str], str] = lambda name: "model") -> Any:
    """A tiny model whose linears share codebooks; ``scope`` names each linear's."""
    model = tiny_model()
    norms, settings = random_act_norms(model), VQSettings(d=D, bits=CODE_BITS / D)
    codebooks: dict[str, Codebook] = {}
    groups: dict[str, list[str]] = {}
    for name, linear in decoder_linears(model).items():
        key = scope(name)
        codebook = codebooks.setdefault(key, random_codebook(key, len(codebooks)))
        weight = compress(linear.weight.detach(), norms[name], codebook)
        model.set_submodule(name, packed_linear("vq", weight, linear.bias))
        groups.setdefault(key, []).append(name)
    adopt_codebooks(model)
    attach(model, NowagConfig(groups=[
        format_group("vq", {**settings.form(), "codebook": key}, torch.float32, {}, names)
        for key, names in groups.items()
    ]))  # fmt: skip
    return model


def layers(model: nn.Module) -> list[VQLinear]:
    return [module for module in model.modules() if isinstance(module, VQLinear)]


def assert_one_codebook(model: Any) -> None:
    owned = getattr(model.base_model, OWNER).model
    assert len(layers(model)) == LINEARS
    for layer in layers(model):
        assert layer.codebook is owned


# --- one layer ------------------------------------------------------------------------------------


def test_assigns_in_units_that_do_not_depend_on_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 41, generator=generator)
    act_norms = torch.rand(41, generator=generator) + 0.1
    codebook = random_codebook()
    vq = compress(weight, act_norms, codebook)
    assert vq.codebook is codebook.entries
    assert vq.shared == {"codebook": "model"}
    parts = normalize_weight(weight, act_norms)
    h = nn.functional.pad(parts.importance, (0, 3))
    want = reference.kmeans_assign(parts.normalized * 41**0.5, h, codebook.entries.float())
    assert torch.equal(ops.unpack_codes(vq.codes, 70).to(torch.int32), want.to(torch.int32))
    error = (vq.dequantize() / parts.row_norms[:, None] / parts.col_norms) - parts.normalized
    objective = (parts.importance * error.square()).sum()
    objective /= (parts.importance * parts.normalized.square()).sum()
    assert vq.relative_objective == pytest.approx(float(objective), rel=2e-3)
    assert 0 < vq.relative_objective < 1


def test_bits_count_a_shared_codebook_once_for_the_model() -> None:
    weight, act_norms = torch.randn(64, 64), torch.ones(64)
    own = vq_compress(weight, act_norms, d=D, bits=CODE_BITS / D, iters=2)
    vq = compress(weight, act_norms, random_codebook())
    assert own.nbytes - vq.nbytes == own.codebook.nbytes == vq.codebook.nbytes
    assert vq.bits_per_weight == 8 * vq.nbytes / 64**2


def test_unfit_codebooks_are_refused() -> None:
    weight, act_norms = torch.randn(64, 64), torch.ones(64)
    with pytest.raises(ValueError, match=r"does not fit d=6 .* 12 bits: .* 4096 entries of 6"):
        vq_compress(weight, act_norms, codebook=random_codebook())
    with pytest.raises(ValueError, match="must be on W's device cpu, not on meta"):
        compress(weight, act_norms, Codebook(torch.empty(64, D, device="meta")))
    with pytest.raises(ValueError, match=r"not the shape \(65, 4\)"):
        Codebook(torch.zeros(65, D))
    with pytest.raises(ValueError, match=r"not the shape \(64, 9\)"):
        Codebook(torch.zeros(64, 9))
    with pytest.raises(ValueError, match="must be finite in fp16"):
        Codebook(torch.full((64, D), 1e6))
    with pytest.raises(ValueError, match=r"letters, digits, .* not 'a\.b'"):
        Codebook(torch.zeros(64, D), "a.b")
    for taken in ("forward", "training", "register_parameter"):
        with pytest.raises(ValueError, match=f"cannot be called '{taken}'"):
            Codebook(torch.zeros(64, D), taken)
    with pytest.raises(TypeError, match="must be a floating-point"):
        Codebook(torch.zeros(64, D, dtype=torch.int32))


def test_layers_of_one_name_must_have_one_codebook() -> None:
    pair = nn.ModuleList(
        VQLinear.from_weight(compress(torch.randn(64, 64), torch.ones(64), random_codebook(seed=s)))
        for s in (1, 2)
    )
    with pytest.raises(ValueError, match="1 has another codebook 'model' than the linears before"):
        adopt_codebooks(pair)


# --- a whole model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "stored"),
    [
        (lambda name: "model", {"model"}),
        (
            lambda name: name.rpartition(".")[2],
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
    ids=["model", "kind"],
)
def test_stored_once_and_loaded_again(
    scope: Callable[[str], str], stored: set[str], tmp_path: Path
) -> None:
    model = shared_model(scope)
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert {name for name in tensors if "codebook" in name} == {f"{STORED}.{n}" for n in stored}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(model), logits(loaded))
    assert not any(p.requires_grad for layer in layers(loaded) for p in [layer.codebook])
    loaded.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    again = nowag_ext.load(tmp_path / "two", dtype=torch.bfloat16)
    assert {layer.codebook.dtype for layer in layers(again)} == {torch.float16}
    assert torch.equal(logits(model), logits(nowag_ext.load(tmp_path / "two")))


def test_without_the_head_and_back(tmp_path: Path) -> None:
    model = shared_model()
    model.save_pretrained(tmp_path / "causal")
    with torch.no_grad():
        want = model.model(tiny_tokens()).last_hidden_state
        body = AutoModel.from_pretrained(tmp_path / "causal")
        assert torch.equal(body(tiny_tokens()).last_hidden_state, want)
        body.save_pretrained(tmp_path / "body")
        again = AutoModel.from_pretrained(tmp_path / "body")
        assert torch.equal(again(tiny_tokens()).last_hidden_state, want)


def test_a_missing_codebook_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shared_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{STORED}.model"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"it has no tensor {STORED}\.model"):
        nowag_ext.load(tmp_path)


@pytest.mark.parametrize("name", ["forward", "a.b", "", 3, {}])
def test_unfit_names_in_a_configuration_are_refused(name: Any, tmp_path: Path) -> None:
    shared_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["groups"][0]["codebook"] = name
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"groups\[0\].*codebook|codebook in .*groups\[0\]"):
        nowag_ext.load(tmp_path)


def test_dequantized_models_have_no_codebooks(tmp_path: Path) -> None:
    model = shared_model()
    want = logits(model)
    model.save_pretrained(tmp_path)
    dense = nowag_ext.to_dense(nowag_ext.load(tmp_path))
    assert not any("codebook" in name for name in dense.state_dict())
    torch.testing.assert_close(logits(dense), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_share_among_themselves(clone: Callable[[Any], Any]) -> None:
    model = shared_model()
    other = clone(model)
    assert_one_codebook(other)
    assert layers(other)[0].codebook is not layers(model)[0].codebook
    assert torch.equal(logits(model), logits(other))


def test_state_dict_round_trip() -> None:
    model, other = shared_model(), shared_model()
    state = model.state_dict()
    with torch.no_grad():
        getattr(other.base_model, OWNER).model.zero_()
    other.load_state_dict(state)
    assert_one_codebook(other)
    assert torch.equal(logits(model), logits(other))


def test_dtype_survives_and_tensors_stay_shared() -> None:
    model = shared_model()
    before = layers(model)[0].codebook.clone()
    nn.Module.float(nn.Module.half(model.to(torch.bfloat16)))
    assert_one_codebook(model)
    assert torch.equal(layers(model)[0].codebook, before)


def test_offload_to_the_cpu(tmp_path: Path) -> None:
    model = shared_model()
    want = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert layers(model)[0].codes.is_meta
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    model = shared_model()
    model.save_pretrained(tmp_path)
    loaded = nowag_ext.load(tmp_path, device_map=device_map)
    assert_one_codebook(loaded)
    assert torch.equal(logits(model), logits(loaded))


def test_a_codebook_ties_no_layer_to_another() -> None:
    """What is tied goes to one device as a whole, where accelerate and transformers place it."""
    model = shared_model()
    tied = accelerate.utils.find_tied_parameters(model)
    assert [sorted(group) for group in tied] == [["lm_head.weight", "model.embed_tokens.weight"]]
    assert set(model.all_tied_weights_keys) == {"lm_head.weight"}


def test_a_layer_on_another_device_copies_the_codebook_once() -> None:
    layer = VQLinear.from_weight(compress(torch.randn(64, 64), torch.ones(64), random_codebook()))
    owner = layer.codebook
    layer.to("meta")  # stands for a second device; the owner stays
    assert layer.codebook is owner
    x = torch.empty(2, 64, device="meta")
    assert layer(x).shape == (2, 64)
    copied = layer._shared(torch.device("meta"))
    assert copied.device.type == "meta"
    assert layer._shared(torch.device("meta")) is copied


def test_compiles_without_graph_breaks() -> None:
    model = shared_model()
    layer, x = layers(model)[0], torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = shared_model()
        want = model(tiny_tokens()).logits
    assert torch.equal(logits(model), want)
