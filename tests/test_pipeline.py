"""Whole models compressed block by block: what it gains, what it leaves, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from tiny_models import ARCHITECTURES, LINEARS, VOCABULARY, tiny_model
from torch import Tensor

import nowag_ext
from nowag_ext import compress, compress_model
from nowag_ext.calibrate import calibrate
from nowag_ext.hessian import DAMPING
from nowag_ext.pipeline import compress as pipeline

SETTINGS: dict[str, Any] = {"d": 4, "bits": 1.5, "iters": 10}


def windows(count: int = 24, length: int = 32, seed: int = 0) -> Tensor:
    """Text of few words, so that inputs are correlated, as those of real text are."""
    words = torch.randint(0, VOCABULARY, (12, 4), generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 12, (count, length // 4), generator=generator)
    return words[chosen].reshape(count, length)


def logits(model: Any, seed: int = 1) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(windows(4, seed=seed)).logits.float()
    return found


def divergence(dense: Tensor, other: Tensor) -> float:
    p, q = (torch.log_softmax(part, -1) for part in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_nearer_to_the_dense_model_than_layer_by_layer(architecture: str) -> None:
    dense = logits(tiny_model(architecture))
    alone, together = tiny_model(architecture), tiny_model(architecture)
    compress_model(alone, calibrate(alone, list(windows()[:, None])), **SETTINGS)
    compress(together, windows(), codebook_scope="layer", **SETTINGS)
    assert divergence(dense, logits(together)) < 0.8 * divergence(dense, logits(alone))


@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_pruning_is_nearer_too(given: dict[str, Any]) -> None:
    dense = logits(tiny_model())
    alone, together = tiny_model(), tiny_model()
    compress_model(alone, calibrate(alone, list(windows()[:, None])), "prune", **given)
    compress(together, windows(), "prune", **given)
    assert divergence(dense, logits(together)) < 0.8 * divergence(dense, logits(alone))
    report = together.nowag_report
    assert report.settings["sparsity"] == given.get("sparsity")
    assert all(layer.relative_objective > 0 for layer in report.layers)


def test_report_and_shared_codebook(tmp_path: Path) -> None:
    model = tiny_model()
    compress(model, windows(), **SETTINGS)
    report = model.nowag_report
    assert len(report.layers) == LINEARS
    assert [layer.name for layer in report.layers][:4] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    ]
    assert report.codebook_bytes == 64 * 4 * 2
    for layer in report.layers:
        assert layer.damping == DAMPING
        assert layer.effective_rank is not None
        assert 1 <= layer.effective_rank <= layer.in_features
    assert ",damping,effective_rank\n" in report.to_csv()
    assert set(report.stages) == {
        "activation norms", "codebooks", "re-estimation", "forwards", "statistics", "compression",
    }  # fmt: skip
    assert sum(report.stages.values()) <= report.seconds
    codebooks = {id(linear.codebook) for linear in model.modules() if hasattr(linear, "codes")}
    assert len(codebooks) == 1
    model.save_pretrained(tmp_path)
    again = nowag_ext.load(tmp_path)
    assert_same_bits(logits(again), logits(model))


def test_scopes_and_overrides() -> None:
    model = tiny_model()
    compress(
        model, windows(), codebook_scope="kind", ignore=("lm_head", "k_proj"), **SETTINGS,
        overrides={"down_proj": {"method": "prune", "pattern": "2:4"}, "o_proj": {"bits": 1}},
    )  # fmt: skip
    kinds = {
        name.rpartition(".")[2]: getattr(module, "codebook_name", None)
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
    assert kinds == {
        "q_proj": "q_proj-d4-6", "k_proj": None, "v_proj": "v_proj-d4-6", "o_proj": "o_proj-d4-4",
        "gate_proj": "gate_proj-d4-6", "up_proj": "up_proj-d4-6", "down_proj": None,
    }  # fmt: skip
    assert isinstance(model.model.layers[0].mlp.down_proj, nowag_ext.SparseLinear)
    assert isinstance(model.model.layers[0].self_attn.k_proj, torch.nn.Linear)
    assert torch.isfinite(logits(model)).all()


def test_same_again() -> None:
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        compress(model, windows(), **SETTINGS)
    for (name, one), two in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert_same_bits(one, two, name)


@pytest.mark.parametrize("method", ["vq", "prune"])
def test_default_dtype_and_grad_mode_do_not_matter(method: str) -> None:
    settings = SETTINGS if method == "vq" else {"pattern": "2:4"}
    wanted, model = tiny_model(), tiny_model()
    compress(wanted, windows(), method, **settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            compress(model, windows(), method, **settings)
    finally:
        torch.set_default_dtype(before)
    for (name, one), two in zip(
        model.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert_same_bits(one, two, name)


def test_half_precision_models_go_through_in_float32() -> None:
    """The same weights in bf16 and fp32 end alike: nothing but norms and heads differ."""
    rounded = tiny_model().bfloat16()
    wide = tiny_model().bfloat16().float()
    dense = logits(wide)
    for model in (rounded, wide):
        compress(model, windows(), **SETTINGS)
    assert rounded.dtype == torch.bfloat16
    assert rounded.model.layers[0].mlp.gate_proj.codes.dtype == torch.uint8
    assert divergence(dense, logits(rounded)) < 1.3 * divergence(dense, logits(wide))


def test_model_is_as_it_was_after_an_interrupt() -> None:
    model = tiny_model().train()
    before = parameters(model)

    def interrupt(name: str, _done: float, _total: float) -> None:
        if name == "model.layers.1.self_attn.o_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, windows(), progress=interrupt, **SETTINGS)
    assert_unchanged(model, before)
    assert model.training
    assert not hasattr(model, "nowag_report")
    assert getattr(model.config, "quantization_config", None) is None


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole, model = tiny_model(), tiny_model()
    compress(whole, windows(), **SETTINGS)

    def interrupt(name: str, done: float, _total: float) -> None:
        if name == "model.layers.1.self_attn.k_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, windows(), work_dir=tmp_path, progress=interrupt, **SETTINGS)
    calls: list[str] = []
    compress(
        model,
        windows(),
        work_dir=tmp_path,
        progress=lambda *call: calls.append(call[0]),
        **SETTINGS,
    )
    for (name, one), two in zip(
        model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert_same_bits(one, two, name)
    resumed = [layer.name for layer in model.nowag_report.layers if layer.resumed]
    assert len(resumed) == 7  # q_proj of the second layer goes with its group
    assert not any(name.startswith("codebook") for name in calls)


@pytest.mark.parametrize("head", [None, {"d": 2, "bits": 4}])
def test_what_is_finished_is_not_gone_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: dict[str, Any] | None
) -> None:
    whole, model = tiny_model(), tiny_model()
    compress(whole, windows(), head=head, work_dir=tmp_path, **SETTINGS)
    monkeypatch.setattr(pipeline._Run, "through", None)
    compress(model, windows(), head=head, work_dir=tmp_path, **SETTINGS)
    for (name, one), two in zip(
        model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert_same_bits(one, two, name)
    assert all(layer.resumed for layer in model.nowag_report.layers)
    assert "statistics" not in model.nowag_report.stages
    # With anything missing all is gone through.
    last = "lm_head" if head else "model.layers.1.mlp.down_proj"
    (tmp_path / f"{last}.safetensors").unlink()
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        compress(tiny_model(), windows(), head=head, work_dir=tmp_path, **SETTINGS)


def test_nothing_is_taken_from_another_run(tmp_path: Path) -> None:
    compress(tiny_model(), windows(), work_dir=tmp_path, **SETTINGS)
    for changes in ({"seed": 1}, {"codebook_scope": "kind"}):
        model = tiny_model()
        compress(model, windows(), work_dir=tmp_path, **{**SETTINGS, **changes})
        assert not any(layer.resumed for layer in model.nowag_report.layers)
    model = tiny_model()
    compress(model, windows(seed=5), work_dir=tmp_path, **SETTINGS)
    assert not any(layer.resumed for layer in model.nowag_report.layers)


def test_progress_ends_where_all_is_done() -> None:
    calls: list[tuple[str, float, float]] = []
    compress(tiny_model(), windows(), progress=lambda *call: calls.append(call), **SETTINGS)
    weights = [call for call in calls if call[0].startswith("model.layers.")]
    assert weights[-1][1] == weights[-1][2] > 0
    assert [call[1] for call in weights] == sorted(call[1] for call in weights)
    stages = list(dict.fromkeys(call[0] for call in calls))
    assert stages[:4] == [
        "activation norms", "codebook model-d4-6 being seeded", "codebook model-d4-6",
        "codebook re-estimated",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"tokens": [1, 2]},
            TypeError,
            "tokens must be a tensor of int64 or int32, not of type list",
        ),
        ({"tokens": torch.zeros(4)}, TypeError, "not torch.float32"),
        (
            {"tokens": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"must have shape \[batch, tokens\]",
        ),
        ({"tokens": torch.full((1, 8), VOCABULARY)}, ValueError, "token ids must be in"),
        (
            {"tokens": torch.cat([windows(), torch.full((1, 32), -1)])},
            ValueError,
            "token ids must be in .*but there is -1",
        ),
        ({"codebook_scope": "world"}, ValueError, "codebook_scope must be one of model, kind"),
        ({"bits": 1.3}, ValueError, r"d \* bits must be an integer"),
        ({"method": "prune"}, TypeError, "method 'prune' has no setting"),
        ({"ignore": ("nothing",)}, ValueError, "names no linear layer"),
    ],
)
def test_refusals_come_first(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    model = tiny_model()
    before = parameters(model)
    arguments: dict[str, Any] = {"tokens": windows(), **SETTINGS, **changes}
    calls: list[Any] = []
    with pytest.raises(error, match=sentence):
        compress(
            model, arguments.pop("tokens"), progress=lambda *call: calls.append(call), **arguments
        )
    assert_unchanged(model, before)
    assert not calls, "work had begun"
