"""Calibration: sums against an oracle, masks, merging, the file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, LINEARS, VOCABULARY, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from nowag_ext import CalibrationStatistics, calibrate, collect_statistics, load_act_norms


def recorded_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every linear's inputs [tokens, in_features] in float64, one forward pass over ``tokens``."""
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            handles.append(
                module.register_forward_hook(
                    lambda _m, args, _o, name=name: inputs.setdefault(name, []).append(
                        args[0].detach().double().reshape(-1, args[0].shape[-1]).clone()
                    )
                )
            )
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_root_mean_squares_of_every_linear(architecture: str) -> None:
    model = tiny_model(architecture)
    batches = [tiny_tokens(2, 9, seed=3), tiny_tokens(3, 17, seed=4).int()]
    norms = calibrate(model, batches)
    oracle = [recorded_inputs(model, batch) for batch in batches]
    assert set(norms) == set(oracle[0])
    assert len(norms) == LINEARS
    for name, got in norms.items():
        rows = torch.cat([inputs[name] for inputs in oracle])
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), rows.square().mean(0).sqrt(), rtol=1e-6, atol=0)


def test_half_precision_models() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    tokens = tiny_tokens()
    oracle = recorded_inputs(model, tokens)
    for name, got in calibrate(model, [tokens]).items():
        want = oracle[name].square().mean(0).sqrt()
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_masked_positions_do_not_count() -> None:
    model = tiny_model()
    long, short = tiny_tokens(1, 12, seed=5), tiny_tokens(1, 7, seed=6)
    padded = torch.cat([long, torch.nn.functional.pad(short, (0, 5), value=0)])
    mask = torch.ones_like(padded)
    mask[1, 7:] = 0
    together = collect_statistics(model, [{"input_ids": padded, "attention_mask": mask}])
    apart = collect_statistics(model, [long, short])
    assert set(together.tokens.values()) == {19}
    assert together.tokens == apart.tokens
    for name, squares in together.sum_squares.items():
        torch.testing.assert_close(squares, apart.sum_squares[name], rtol=1e-5, atol=1e-9)


def test_statistics_merge_and_survive_a_file(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = tiny_tokens(2, 8, seed=7), tiny_tokens(1, 30, seed=8)
    one, two = (collect_statistics(model, [tokens]) for tokens in (first, second))
    path = tmp_path / "deep" / "statistics.safetensors"
    one.merge(two).save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = CalibrationStatistics.load(path)
    both = collect_statistics(model, [first, second])
    assert loaded.tokens == both.tokens
    for name, squares in loaded.sum_squares.items():
        assert squares.dtype == torch.float64
        torch.testing.assert_close(squares, both.sum_squares[name], rtol=1e-12, atol=0)
    for name, norms in load_act_norms(path).items():
        assert torch.equal(norms, loaded.act_norms()[name])


def test_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    calibrate(model, [tiny_tokens()])
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_batches() -> None:
    seen: list[tuple[str, float, float]] = []
    batches = [tiny_tokens(), tiny_tokens()]
    calibrate(tiny_model(), batches, progress=lambda *event: seen.append(event))
    assert seen == [("calibrate", 1, 2), ("calibrate", 2, 2)]
    seen.clear()
    calibrate(tiny_model(), iter(batches), progress=lambda *event: seen.append(event))
    assert seen == [("calibrate", 1, 0), ("calibrate", 2, 0)]


def test_non_finite_activations_name_the_module() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj.*input 5 is"):
        calibrate(model, [tiny_tokens()])
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "error", "sentence"),
    [
        ([], ValueError, "token_batches is empty"),
        ([torch.ones(2, 3)], TypeError, r"int64 or int32, not torch\.float32"),
        ([[1, 2, 3]], TypeError, "int64 or int32, not list"),
        ([torch.ones(3, dtype=torch.int64)], ValueError, r"\[batch, tokens\], not \(3,\)"),
        ([torch.full((1, 4), VOCABULARY)], ValueError, r"in \[0, 200\), but there is 200"),
        ([torch.full((1, 4), -1)], ValueError, r"in \[0, 200\), but there is -1"),
        (
            [{"input_ids": tiny_tokens(1, 4), "attention_mask": torch.ones(1, 5)}],
            ValueError,
            r"shape of input_ids, \(1, 4\), not \(1, 5\)",
        ),
    ],
)
def test_unfit_batches_are_refused(
    batches: list[Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        calibrate(tiny_model(), batches)


def test_statistics_of_different_models_do_not_merge() -> None:
    one = CalibrationStatistics({"a": torch.ones(3, dtype=torch.float64)}, {"a": 1})
    two = CalibrationStatistics({"a": torch.ones(4, dtype=torch.float64)}, {"a": 1})
    with pytest.raises(ValueError, match="a has 4 inputs in one set of statistics and 3"):
        one.merge(two)
    assert one.sum_squares["a"].tolist() == [1, 1, 1]


def test_routed_linears_refuse_padding() -> None:
    """Where an expert sees only some tokens, padding cannot be told apart."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    layer = model.model.layers[0]
    layer.mlp = _HalfOfTheTokens(32)
    calibrate(model, [tiny_tokens()])
    tokens = tiny_tokens()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.expert sees 24 of the batch's 48"):
        calibrate(model, [{"input_ids": tokens, "attention_mask": mask}])


class _HalfOfTheTokens(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.expert = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        half = len(rows) // 2
        return torch.cat([self.expert(rows[:half]), rows[half:]]).reshape(x.shape)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "other", "version", "half"])
def test_unfit_files_are_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "statistics.safetensors"
    collect_statistics(tiny_model(), [tiny_tokens()]).save(path)
    metadata = {"format": "nowag-calibration", "format_version": "1"}
    sentences = {
        "missing": "there is no calibration file",
        "truncated": "truncated or no safetensors file",
        "text": "truncated or no safetensors file",
        "other": "not a file of calibration statistics",
        "version": "has format_version 99, but this nowag_ext .* reads version 1",
        "half": r"no complete statistics of model\.layers\.0",
    }
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "text":
        path.write_text("act_norms: 1, 2, 3")
    elif damage == "other":
        save_file(load_file(path), path)
    elif damage == "version":
        save_file(load_file(path), path, {**metadata, "format_version": "99"})
    elif damage == "half":
        tensors = load_file(path)
        del tensors["model.layers.0.mlp.up_proj.tokens"]
        save_file(tensors, path, metadata)
    with pytest.raises((ValueError, FileNotFoundError), match=sentences[damage]):
        CalibrationStatistics.load(path)
