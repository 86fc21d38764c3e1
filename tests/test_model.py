"""compress_model: what is replaced, what is refused before work starts, interrupting, resuming."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    LINEARS,
    VOCABULARY,
    logits,
    random_act_norms,
    tiny_model,
    tiny_tokens,
)
from torch import Tensor, nn
from torch.nn.utils import prune as prune_by_mask
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nowag_ext import (
    ModelReport,
    SparseLinear,
    VQLinear,
    calibrate,
    compress,
    compress_model,
    prune,
    to_dense,
    vq_compress,
)
from nowag_ext.decoder import decoder_layers, decoder_linears

VQ = {"d": 4, "bits": 1.5, "iters": 4}
DOWN = "model.layers.1.mlp.down_proj"


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not hasattr(model, "nowag_report")
    assert getattr(model, "hf_quantizer", None) is None
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", ["vq", "prune"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replaces_every_linear_of_the_decoder_layers(architecture: str, method: str) -> None:
    model = tiny_model(architecture)
    act_norms = calibrate(model, [tiny_tokens()])
    before = {name: module.weight.clone() for name, module in decoder_linears(model).items()}
    settings: dict[str, Any] = VQ if method == "vq" else {"pattern": "2:4"}
    assert compress_model(model, act_norms, method, **settings) is model
    assert decoder_linears(model) == {}
    for name, weight in before.items():
        module = model.get_submodule(name)
        assert type(module) is (VQLinear if method == "vq" else SparseLinear)
        compressor: Any = vq_compress if method == "vq" else prune
        want = compressor(weight, act_norms[name], **settings)
        for part, tensor in want.tensors().items():
            assert torch.equal(module.get_parameter(part), tensor)
    assert type(model.lm_head) is nn.Linear
    report = model.nowag_report
    assert report.coverage == 1
    assert [layer.name for layer in report.layers] == list(before)
    dense_logits = logits(to_dense(model))
    packed = compress_model(tiny_model(architecture), act_norms, method, **settings)
    torch.testing.assert_close(logits(packed), dense_logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(tiny_model(architecture)), dense_logits, atol=0.1)


def test_biases_and_dense_tensors_keep_value_and_dtype() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.model.norm.float()
    before = snapshot(model)
    compress_model(model, random_act_norms(model), **VQ)
    after = model.state_dict()
    kept = {name for name in before if not name.endswith("_proj.weight")}
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_defaults_are_those_of_the_methods() -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune")
    assert model.nowag_report.settings == {"sparsity": 0.5, "pattern": None}
    kept = model.model.layers[0].mlp.up_proj.values.numel()
    assert kept == 104 * 64 // 2


# --- ignore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        (DOWN, {DOWN}),
        ("mlp.down_proj", {"model.layers.0.mlp.down_proj", DOWN}),
        (r"re:^model\.layers\.1\.mlp\.d", {DOWN}),
    ],
)
def test_ignore_leaves_linears_dense(pattern: str, left: set[str]) -> None:
    model = tiny_model()
    before = snapshot(model)
    compress_model(model, random_act_norms(model), "prune", ["lm_head", pattern])
    assert set(decoder_linears(model)) == left
    assert set(model.nowag_report.ignored) == left
    assert model.nowag_report.coverage < 1
    for name in left:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


@pytest.mark.parametrize(
    ("ignore", "error", "sentence"),
    [
        (["down_prj"], ValueError, "'down_prj' names no linear layer"),
        (["re:("], ValueError, r"'re:\(' is not a regular expression"),
        ("lm_head", TypeError, "must be a list of patterns"),
        (["re:layers"], ValueError, "no nn.Linear in its decoder layers that is not ignored"),
    ],
)
def test_unfit_ignore_patterns(ignore: Any, error: type[Exception], sentence: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error, match=sentence):
        compress_model(model, random_act_norms(model), "prune", ignore)
    assert_unchanged(model, before)


# --- refused before work starts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "error", "sentence"),
    [
        ("gptq", {}, ValueError, "method must be one of vq, prune, not 'gptq'"),
        ("vq", {"sparsity": 0.5}, TypeError, "method 'vq' has no setting 'sparsity': it has d, b"),
        ("prune", {"bits": 2}, TypeError, "method 'prune' has no setting 'bits'"),
        ("vq", {"codebook": None}, TypeError, "has no setting 'codebook'"),
        ("vq", {"d": 3, "bits": 1.5}, ValueError, r"d \* bits must be an integer, not 3 \* 1\.5"),
        ("vq", {"d": 8, "bits": 3}, ValueError, r"from 1 to 16, not 8 \* 3 = 24"),
        ("vq", {"d": 9, "bits": 1}, ValueError, "d must be an integer from 1 to 8, not 9"),
        ("vq", {"d": 2.0}, ValueError, r"d must be an integer from 1 to 8, not 2\.0"),
        ("vq", {"iters": 0}, ValueError, "iters must be a positive integer, not 0"),
        ("vq", {"n_init": 0}, ValueError, "n_init must be a positive integer, not 0"),
        ("vq", {"seed": -1}, ValueError, r"seed must be an integer from 0 to 2\^63 - 1, not -1"),
        ("vq", {"init": "pca"}, ValueError, r"init must be .* or \"random\", not 'pca'"),
        ("prune", {"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), not 1\.0"),
        ("prune", {"sparsity": -0.1}, ValueError, r"sparsity must be in \[0, 1\), not -0\.1"),
        ("prune", {"pattern": "4:2"}, ValueError, "with 1 <= N <= M, not '4:2'"),
        ("prune", {"pattern": "half"}, ValueError, "with 1 <= N <= M, not 'half'"),
        ("prune", {"pattern": "2:4", "sparsity": 0.5}, ValueError, "either sparsity or pattern"),
        (
            "vq", {"d": 6, "bits": 2}, ValueError,
            r"layers\.0\.self_attn\.q_proj is too small: its 64 x 64 weights are 704 sub-vectors "
            r"of 6, fewer than the 4096",
        ),
        (
            "prune", {"pattern": "4:16"}, ValueError,
            r"layers\.0\.mlp\.down_proj cannot be pruned: M = 16 .* must divide in_features 104",
        ),
    ],
)  # fmt: skip
def test_unfit_settings(
    method: str, settings: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error, match=sentence):
        compress_model(
            model, random_act_norms(model), method, work_dir=tmp_path / "work", **settings
        )
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("norms", "error", "sentence"),
    [
        (None, ValueError, "act_norms has no entry for .*: calibrate this model"),
        (torch.ones(5), ValueError, r": act_norms must have shape \(104,\)"),
        (torch.ones(104, dtype=torch.int64), TypeError, "floating-point"),
        (torch.zeros(104), ValueError, "must not all be zero"),
        (-torch.ones(104), ValueError, "must not be negative"),
        (torch.full((104,), float("nan")), ValueError, "must be finite"),
        (torch.full((104,), float("inf")), ValueError, "must be finite"),
        ([1.0] * 104, TypeError, "not list"),
    ],
)
def test_unfit_act_norms_name_the_layer(norms: Any, error: type[Exception], sentence: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    act_norms = random_act_norms(model)
    act_norms[DOWN] = norms
    if norms is None:
        del act_norms[DOWN]
    with pytest.raises(error, match=sentence) as caught:
        compress_model(model, act_norms, **VQ)
    assert DOWN in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_layer(bad: float) -> None:
    model = tiny_model()
    act_norms = random_act_norms(model)
    with torch.no_grad():
        model.get_submodule(DOWN).weight[3, 7] = bad
    with pytest.raises(ValueError, match=f"{DOWN}: W must be finite"):
        compress_model(model, act_norms, "prune")
    assert type(model.get_submodule(DOWN)) is nn.Linear


def test_other_dtypes_name_the_layer() -> None:
    model = tiny_model().double()
    with pytest.raises(TypeError, match=r"q_proj: W must be float32.* not torch\.float64"):
        compress_model(model, random_act_norms(model), "prune")


def test_shared_and_absent_weights_are_refused() -> None:
    model = tiny_model()
    norms = random_act_norms(model)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.up_proj shares its weight with .*1\.mlp"
    ):
        compress_model(model, norms, "prune")
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has no weight"):
        compress_model(model, norms, "prune")


def test_a_compressed_model_is_refused() -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune")
    with pytest.raises(ValueError, match="already quantised"):
        compress_model(model, {}, "prune")


# --- coverage -------------------------------------------------------------------------------------


def _moe(experts: int, ffn: int) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=ffn,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_low_coverage_is_refused_unless_told() -> None:
    model = _moe(experts=8, ffn=48)
    norms = calibrate(model, [tiny_tokens()])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"only \d+% of .* less than the 80% .*experts") as caught:
        compress_model(model, norms, "prune")
    assert_unchanged(model, before)
    told = float(str(caught.value).split("Set min_coverage to ")[1].split(" to ")[0])
    compress_model(model, norms, "prune", min_coverage=told)
    report = model.nowag_report
    assert told <= report.coverage < told + 0.01
    assert any("experts" in name for name in report.not_reached)


def test_explicitly_ignored_linears_do_not_count_as_out_of_reach() -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune", ["mlp.up_proj", "mlp.down_proj"])
    assert 0.3 < model.nowag_report.coverage < 0.7


def test_a_model_without_linears_says_so() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).eval()
    with pytest.raises(ValueError, match=r"no nn.Linear in its decoder.*h\.0\.mlp"):
        compress_model(model, {}, "prune")
    assert list(decoder_layers(model)) == ["transformer.h.0"]


# --- failures, interrupts, resuming ---------------------------------------------------------------


class Stop:
    """A progress callback that raises once ``layers`` layers are finished."""

    def __init__(self, layers: int, error: BaseException) -> None:
        self.layers, self.error = layers, error
        self.names: list[str] = []

    def __call__(self, name: str, done: float, total: float) -> None:
        if name not in self.names:
            self.names.append(name)
        if len(self.names) > self.layers:
            raise self.error


def test_an_interrupted_run_leaves_the_model_and_resumes(tmp_path: Path) -> None:
    model = tiny_model()
    before = snapshot(model)
    norms = random_act_norms(model)
    with pytest.raises(KeyboardInterrupt):
        compress_model(model, norms, work_dir=tmp_path, progress=Stop(5, KeyboardInterrupt()), **VQ)
    assert_unchanged(model, before)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    compress_model(model, norms, work_dir=tmp_path, **VQ)
    layers = model.nowag_report.layers
    assert [layer.resumed for layer in layers] == [True] * 5 + [False] * (LINEARS - 5)
    straight = compress_model(tiny_model(), norms, **VQ)
    assert torch.equal(logits(model), logits(straight))
    for one, two in zip(layers, straight.nowag_report.layers, strict=True):
        assert one.relative_objective == two.relative_objective
        assert one.seconds > 0


@pytest.mark.parametrize("method", ["vq", "prune"])
def test_only_layers_of_the_same_run_are_resumed(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = VQ if method == "vq" else {"sparsity": 0.5}
    other = {**settings, "seed": 1} if method == "vq" else {"sparsity": 0.6}
    norms = random_act_norms(tiny_model())

    def resumed(model_seed: int, norms: dict[str, Tensor], settings: dict[str, Any]) -> int:
        model = tiny_model(seed=model_seed)
        compress_model(model, norms, method, work_dir=tmp_path, **settings)
        return sum(layer.resumed for layer in model.nowag_report.layers)

    assert resumed(0, norms, settings) == 0
    assert resumed(0, norms, settings) == LINEARS
    assert resumed(0, norms, other) == 0
    assert resumed(3, norms, other) == 0
    changed = {**norms, DOWN: norms[DOWN].roll(1)}
    assert resumed(3, changed, other) == LINEARS - 1
    (tmp_path / f"{DOWN}.safetensors").write_bytes(b"half a file")
    assert resumed(3, changed, other) == LINEARS - 1


def test_a_failing_layer_is_named_and_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from nowag_ext import methods

    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no memory for the scratch space")
        return prune(*args, **kwargs)

    monkeypatch.setattr(methods, "prune", failing)
    model = tiny_model()
    before = snapshot(model)
    sentence = r"layers\.0\.self_attn\.v_proj could not be compressed, and the model is unchanged"
    with pytest.raises(RuntimeError, match=sentence):
        compress_model(model, random_act_norms(model), "prune")
    assert_unchanged(model, before)


def test_progress_rises_to_the_number_of_weights() -> None:
    model = tiny_model()
    weights = sum(linear.weight.numel() for linear in decoder_linears(model).values())
    events: list[tuple[str, float, float]] = []
    norms = random_act_norms(model)
    compress_model(model, norms, progress=lambda *event: events.append(event), **VQ)
    done = [event[1] for event in events]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == weights
    assert {event[2] for event in events} == {weights}
    assert len({event[0] for event in events}) == LINEARS


# --- the report -----------------------------------------------------------------------------------


def test_report_counts_everything() -> None:
    model = tiny_model()
    weights = {name: linear.weight.numel() for name, linear in decoder_linears(model).items()}
    compress_model(model, random_act_norms(model), **VQ)
    report = model.nowag_report
    stored = {
        name: sum(p.nbytes for p in model.get_submodule(name).packed_parameters().values())
        for name in weights
    }
    assert report.bytes == sum(stored.values())
    assert report.bits_per_weight == 8 * sum(stored.values()) / sum(weights.values())
    for layer in report.layers:
        assert layer.bytes == stored[layer.name]
        assert layer.bits_per_weight == 8 * stored[layer.name] / weights[layer.name]
        assert 0 < layer.relative_objective < 1
        assert layer.peak_memory > 1e7
    objectives = [layer.relative_objective for layer in report.layers]
    assert report.mean_relative_objective == pytest.approx(sum(objectives) / len(objectives))


def test_report_as_json_and_csv() -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune", ["o_proj"])
    report = model.nowag_report
    assert ModelReport.from_json(report.to_json()) == report
    totals = json.loads(report.to_json())
    assert totals["bits_per_weight"] == report.bits_per_weight
    assert totals["coverage"] == report.coverage
    assert totals["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    assert float(rows[0]["relative_objective"]) == report.layers[0].relative_objective


# --- models that are not plain ones ---------------------------------------------------------------


def test_weights_that_are_computed_are_refused() -> None:
    sentence = r"layers\.0\.mlp\.up_proj computes its weight from other parameters"
    model = tiny_model()
    norms = random_act_norms(model)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=sentence):
        compress_model(model, norms, **VQ)
    model = tiny_model()
    prune_by_mask.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)
    with pytest.raises(ValueError, match=sentence):
        compress_model(model, norms, **VQ)
    prune_by_mask.remove(model.model.layers[0].mlp.up_proj, "weight")
    compress_model(model, norms, **VQ)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class Written(nn.Linear):
    """An nn.Linear in other words, as Falcon has it."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


@pytest.mark.parametrize("kind", [Scaled, Router])
def test_linears_that_do_more_are_refused(kind: type[nn.Linear]) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.__class__ = kind
    sentence = rf"layers\.1\.mlp\.down_proj is a {kind.__name__}, which does more than an nn.Linear"
    with pytest.raises(ValueError, match=sentence):
        compress_model(model, random_act_norms(model), **VQ)
    assert model.model.layers[1].mlp.down_proj.training == model.training
    compress_model(model, random_act_norms(model), ignore=["down_proj"], min_coverage=0.1, **VQ)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_written_otherwise_are_compressed(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Written
    compress_model(model, random_act_norms(model), **VQ)
    assert isinstance(model.model.layers[1].mlp.down_proj, VQLinear)


@pytest.mark.parametrize("whole", ["compress_model", "compress"])
def test_hooks_of_the_user_stay(whole: str) -> None:
    """Those of the linears and, as ever, those around them; through to_dense, until removed."""
    model, seen = tiny_model("llama"), []
    linear, layer = model.get_submodule(DOWN), model.model.layers[1]
    handles = [
        linear.register_forward_hook(lambda module, *_: seen.append(("after", module))),
        linear.register_forward_pre_hook(lambda module, *_: seen.append(("before", module))),
        linear.register_full_backward_hook(lambda module, *_: seen.append(("back", module))),
        layer.register_forward_hook(lambda module, *_: seen.append(("layer", module))),
    ]
    kinds = ["before", "after", "layer", "back"]
    tokens = tiny_tokens()
    if whole == "compress":
        compress(model, tokens, d=4, bits=1.5)
    else:
        compress_model(model, random_act_norms(model), method="vq", **VQ)
    for step in (lambda: None, lambda: to_dense(model)):
        step()
        seen.clear()
        model(inputs_embeds=model.get_input_embeddings()(tokens[:1])).logits.sum().backward()
        module = model.get_submodule(DOWN)
        assert seen == [(kind, layer if kind == "layer" else module) for kind in kinds]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(tokens[:1])
    assert not seen


def test_adapters_are_refused() -> None:
    model = tiny_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="has a PEFT adapter: merge it first"):
        compress_model(model, random_act_norms(model), **VQ)


def test_dead_inputs_are_counted() -> None:
    model = tiny_model()
    norms = random_act_norms(model)
    norms[DOWN][:5] = 0
    compress_model(model, norms, **VQ)
    report = model.nowag_report
    assert {layer.name: layer.dead_inputs for layer in report.layers if layer.dead_inputs} == {
        DOWN: 5
    }
    assert json.loads(report.to_json())["dead_inputs"] == 5
