"""Linears whose weight the model's own code reads: found by running it, refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, random_act_norms, tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

import nowag_ext
from nowag_ext import compress_model, plan
from nowag_ext.decoder import decoder_linears
from nowag_ext.weight_reads import weight_readers

UP = "model.layers.0.mlp.up_proj"


def mamba() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def norms(model: Any) -> dict[str, Tensor]:
    return {n: torch.ones(linear.in_features) for n, linear in decoder_linears(model).items()}


class Reads(nn.Module):
    """An MLP whose code reads the weight of a linear in one way or another."""

    def __init__(self, mlp: Any, how: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj
        if self.how == "product":
            rows = F.linear(x, up.weight)
        elif self.how == "dtype":
            rows = up(x.to(up.weight.dtype))
        elif self.how == "decoding" and x.shape[1] == 1:
            rows = x @ up.weight.T
        elif self.how == "guarded":
            rows = up(x.to(up.weight.dtype) if hasattr(up, "weight") else x)
        elif self.how == "forward":
            rows = up.forward(x)
        else:
            rows = up(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * rows)


@pytest.mark.parametrize("how", ["product", "dtype", "decoding"])
def test_reads_are_found_before_any_work(how: str) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Reads(layer.mlp, how)
    model.train()
    sentence = rf"reads the weight of {UP} and 1 more.*ignore=\['up_proj'\] \(--ignore up_proj\)"
    with pytest.raises(ValueError, match=sentence):
        compress_model(model, norms(model), "prune")
    with pytest.raises(ValueError, match=sentence):
        nowag_ext.compress(model, tiny_tokens(1, 8), "prune")
    assert all(module.training for module in model.modules())
    assert type(model.get_submodule(UP)) is nn.Linear
    compress_model(model.eval(), norms(model), "prune", ["up_proj"])
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("how", ["guarded", "forward", "call"])
def test_what_works_without_the_weight_is_compressed(how: str) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Reads(layer.mlp, how)
    compress_model(model, norms(model), "prune")
    assert logits(model).isfinite().all()


def test_multihead_attention_reads_its_output_projection() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.up = nn.Linear(64, 64)

        def forward(self, x: Tensor, **_others: Any) -> Tensor:
            return x + self.up(self.attention(x, x, x)[0])

    model = tiny_model()
    model.model.layers = nn.ModuleList([Block()])
    found = weight_readers(model, decoder_linears(model))
    assert found == ["model.layers.0.attention.out_proj"]


def test_an_expert_that_no_token_comes_to_counts_too() -> None:
    model = tiny_model()

    class Experts(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.first, self.second = Reads(mlp, "product"), Reads(mlp, "product")
            self.second.up_proj = nn.Linear(64, 104, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model.model.layers[0].mlp = Experts(model.model.layers[0].mlp)
    found = weight_readers(model, decoder_linears(model))
    assert found == ["model.layers.0.mlp.first.up_proj", "model.layers.0.mlp.second.up_proj"]


def test_mamba_without_its_step_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers initialises Mamba's weights unlooked-at; what would fail later is refused."""
    model = mamba()
    with pytest.raises(ValueError, match=r"reads the weight of .*dt_proj and 1 more"):
        compress_model(model, {}, "prune", min_coverage=0.1)
    compress_model(model, norms(model), "prune", ["dt_proj"], min_coverage=0.1)
    model.save_pretrained(tmp_path / "good")
    loaded = nowag_ext.load(tmp_path / "good")
    assert torch.equal(logits(loaded, tiny_tokens() % 99), logits(model, tiny_tokens() % 99))
    assert not hasattr(loaded.backbone.layers[0].mixer.out_proj, "weight")

    model = mamba()
    monkeypatch.setattr(plan, "weight_readers", lambda *_: [])
    compress_model(model, norms(model), "prune", min_coverage=0.1)
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"reads the weight of .*0\.mixer\.dt_proj and 1 more"):
        nowag_ext.load(tmp_path / "bad")


def test_a_model_that_cannot_be_run_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def forward(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("images are needed")

    monkeypatch.setattr(model, "forward", forward)
    compress_model(model, random_act_norms(model), "prune")
