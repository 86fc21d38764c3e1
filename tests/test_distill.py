"""Distillation: gradients against autograd, what moves and what does not, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, assert_within
from families import CONFIGS, LENGTH, make_model
from test_pipeline import windows as text
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional

import nowag_ext
from nowag_ext import compress, distill, prune, reference, vq_compress
from nowag_ext.decoder import decoder_linears
from nowag_ext.linear import PackedLinear
from nowag_ext.pipeline import distill as distillation
from nowag_ext.pipeline.tuned import TunedTensors
from nowag_ext.vq import VQWeight

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {"d": 4, "bits": 1.5, "iters": 5},
    "own": {"d": 3, "bits": 2, "iters": 5, "codebook_scope": "layer"},
    "prune": {"method": "prune", "sparsity": 0.5},
}
every_form = pytest.mark.parametrize("form", SETTINGS)


def windows(count: int = 6, seed: int = 3) -> Tensor:
    return text(count, LENGTH, seed)


def compressed(form: str, model: Any = None) -> Any:
    model = tiny_model() if model is None else model
    return compress(model, windows(12, seed=5), **SETTINGS[form])


def keep_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_KEEP_EVERY", 0.0)
    monkeypatch.setattr(distillation, "_KEEPING", float("inf"))


def packed(model: Any) -> dict[str, PackedLinear]:
    return {n: part for n, part in model.named_modules() if isinstance(part, PackedLinear)}


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def divergence(dense: Any, model: Any, tokens: Tensor) -> Tensor:
    """Mean KL(dense || model), recorded."""
    expected, said = (torch.log_softmax(one(tokens).logits.float(), -1) for one in (dense, model))
    total = functional.kl_div(said, expected.detach(), reduction="sum", log_target=True)
    return total / tokens.numel()


@pytest.mark.parametrize(
    ("rows", "cols", "d"), [(40, 24, 4), (33, 25, 6), (1, 7, 8), (1100, 9, 3), (70, 1, 1)]
)
def test_gradients_of_a_quantised_weight(
    rows: int, cols: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through the oracle of the dense form, in float64."""
    torch.manual_seed(rows)
    codebook = torch.randn(4, d)
    weight = vq_compress(
        torch.randn(rows, cols), torch.rand(cols) + 0.1, d=d, bits=2 / d, codebook=codebook
    )
    grad = torch.randn(rows, cols)
    parts = {name: getattr(weight, name).double().requires_grad_() for name in weight.step_sizes()}
    codes = reference.unpack_codes(weight.codes, rows).long()
    entries = parts["codebook"][codes].flatten(1)[:, :cols]
    dense = parts["row_norms"][:, None] * entries * parts["col_norms"]
    torch.testing.assert_close(dense.float(), weight.dequantize(), rtol=1e-5, atol=1e-7)
    wanted = torch.autograd.grad(dense, list(parts.values()), grad.double())
    found = weight.gradients(grad)
    assert list(found) == list(parts)
    for name, want in zip(parts, wanted, strict=True):
        bound = 1e-5 * want.abs().max() + 1e-6
        assert_within(found[name].double(), want, bound.expand_as(want), name)


@pytest.mark.parametrize("given", [{"sparsity": 0.3}, {"pattern": "2:4"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_pruned_weight(given: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = prune(torch.randn(17, 72).to(dtype), torch.rand(72) + 0.1, **given)
    grad = torch.randn(17, 72)
    kept = weight.dequantize() != 0
    assert_same_bits(weight.gradients(grad)["values"], grad[kept])
    assert_same_bits(weight.dequantize(dtype)[kept], weight.values)


@pytest.mark.parametrize(
    ("family", "form"),
    [*((family, "shared") for family in CONFIGS), ("llama", "own"), ("gemma3", "prune")],
)
def test_gradients_of_a_whole_model(family: str, form: str) -> None:
    """Layer by layer, from packed weights, against one backward through the dense form of all."""
    dense, model = make_model(family), compressed(form, make_model(family))
    tokens = windows(1)
    plain = make_model(family)
    weights = {name: module.weight_form() for name, module in packed(model).items()}
    for name, weight in weights.items():
        linear = plain.get_submodule(name)
        linear.weight.data = weight.dequantize()
    divergence(dense, plain, tokens).backward()
    wanted = TunedTensors(weights)
    for name, weight in weights.items():
        gradient = plain.get_submodule(name).weight.grad
        assert gradient is not None
        wanted.add(name, weight, gradient)
    student = distillation._Student(model, LENGTH, packed(model))
    with torch.no_grad():
        states, head = distillation._predictions(dense, tokens, student, None, None)
        run = distillation._Run(student, tokens, states, head, 1e-9, 1, 0, None)
        before = run._optimizer.step
        seen: dict[str, Tensor] = {}

        def look() -> None:
            seen.update({n: step.grad.clone() for n, step in student.tuned.steps.items()})  # type: ignore[union-attr]
            before()

        run._optimizer.step = look  # type: ignore[method-assign, assignment]
        found = run._step(0, 1e-9)
    whole = divergence(dense, plain, tokens).item()
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    assert seen.keys() == wanted.steps.keys()
    for name, step in wanted.steps.items():
        assert step.grad is not None
        bound = 2e-3 * step.grad.abs().max() + 1e-7
        assert_within(seen[name], step.grad, bound.expand_as(step.grad), name)


@every_form
def test_is_nearer_to_the_dense_model(form: str) -> None:
    dense, model = tiny_model(), compressed(form)
    before, seen, unseen = state(model), windows(16), windows(24, seed=77)
    with torch.no_grad():
        began = [float(divergence(dense, model, t)) for t in (seen, unseen)]
    calls: list[tuple[str, float, float]] = []
    learnt = distill(
        model, dense, seen, passes=3, learning_rate=1e-2,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    with torch.no_grad():
        ended = [float(divergence(dense, model, t)) for t in (seen, unseen)]
    assert ended[0] < 0.95 * began[0]
    assert ended[1] < began[1]
    assert calls[-1] == ("distillation", 48, 48)
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    still = before.keys() - moved
    continuous = ("codebook", "row_norms", "col_norms", "values", "nowag_codebooks.model-d4-6")
    assert all(name.endswith(continuous) for name in moved)
    assert not any(name.endswith(continuous) for name in still)
    assert (learnt.passes, learnt.tokens, len(learnt.divergences)) == (3, 16 * LENGTH, 3)
    assert learnt.divergences[-1] < learnt.divergences[0]
    report = model.nowag_report
    assert nowag_ext.ModelReport.from_json(report.to_json()).distillation == learnt
    assert report.peak_memory == learnt.peak_memory >= max(one.peak_memory for one in report.layers)


def test_layers_are_run_again_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("shared")
    student = distillation._Student(model, LENGTH, packed(model))
    one = student.visit(0, student.embed(windows(1))).nbytes
    assert one > 1 << 16
    found = []
    for room in (1 << 30, one, 0):
        monkeypatch.setattr(distillation, "_RECORD_BYTES", room)
        model = compressed("shared")
        distill(model, tiny_model(), windows(), learning_rate=1e-2)
        found.append(state(model))
    for name, tensor in found[0].items():
        assert_same_bits(found[1][name], tensor, name)
        assert_same_bits(found[2][name], tensor, name)


@every_form
def test_saved_and_loaded(form: str, tmp_path: Path) -> None:
    model = compressed(form)
    distill(model, tiny_model(), windows(), learning_rate=1e-2)
    with torch.no_grad():
        wanted = model(windows()).logits
    nowag_ext.save_compressed(model, None, tmp_path / "out")
    with torch.no_grad():
        assert_same_bits(nowag_ext.load(tmp_path / "out")(windows()).logits, wanted)


def test_models_made_in_inference_mode_and_callers_in_it() -> None:
    models = [compressed("shared"), compressed("shared")]
    with torch.inference_mode():
        models.append(compressed("shared", tiny_model()))
        distill(models[0], tiny_model(), windows(), learning_rate=1e-2)
        distill(models[2], tiny_model(), windows(), learning_rate=1e-2)
    distill(models[1], tiny_model(), windows(), learning_rate=1e-2)
    for name, tensor in state(models[0]).items():
        assert_same_bits(models[1].state_dict()[name], tensor, name)
        assert_same_bits(models[2].state_dict()[name], tensor, name)


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_every_step(monkeypatch)
    given: dict[str, Any] = {"passes": 2, "learning_rate": 1e-2}
    model = compressed("shared")
    distill(model, tiny_model(), windows(), **given)
    whole = state(model)
    model = compressed("shared")
    before = state(model)

    def interrupt(what: str, done: float, total: float) -> None:
        if what.startswith("distillation") and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, tiny_model(), windows(), work_dir=tmp_path, progress=interrupt, **given)
    for name, tensor in state(model).items():
        assert_same_bits(tensor, before[name], name)
    steps: list[float] = []

    def note(what: str, done: float, total: float) -> None:
        if what.startswith("distillation"):
            steps.append(done)

    distill(model, tiny_model(), windows(), work_dir=tmp_path, progress=note, **given)
    assert steps[0] == 7
    for name, tensor in state(model).items():
        assert_same_bits(tensor, whole[name], name)
    # Nothing is taken from what was kept of another text.
    steps.clear()
    other = windows(seed=9)
    distill(compressed("shared"), tiny_model(), other, work_dir=tmp_path, progress=note, **given)
    assert steps[0] == 0


def test_half_precision_models_and_other_devices_of_layers(tmp_path: Path) -> None:
    """The dense model's layers are on disk, the compressed one is in bfloat16."""
    dense = tiny_model(dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    on_disk = nowag_ext.checkpoint.dense_model(
        tmp_path / "dense", "bfloat16", offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in on_disk.parameters())
    found = {}
    for name, teacher in (("memory", dense), ("disk", on_disk)):
        model = compressed("shared", tiny_model(dtype=torch.bfloat16))
        distill(model, teacher, windows(), learning_rate=1e-2)
        assert {t.dtype for n, t in model.named_parameters() if "norm.weight" in n} == {
            torch.bfloat16
        }
        found[name] = state(model)
    for name, tensor in found["memory"].items():
        assert_same_bits(found["disk"][name], tensor, name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"passes": 0}, "passes must be a positive integer, not 0"),
        ({"passes": 1.5}, "passes must be a positive integer, not 1.5"),
        ({"seed": -1}, "seed must be"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, below 1, not 0.0"),
        ({"learning_rate": 1.0}, "learning_rate must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
        ({"learning_rate": "much"}, "learning_rate must be a number"),
        ({"tokens": torch.full((2, 8), 5000)}, "token ids must be in"),
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, "must have shape"),
        ({"tokens": {"input_ids": torch.zeros(1, 8)}}, "tokens must be a tensor of int64 or int32"),
        ({"model": "dense"}, "the model is not compressed: compress it first"),
        ({"dense": "small"}, "the dense model chooses among 100 tokens and the compressed one"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    model = compressed("shared")
    before = state(model)
    given = {"model": model, "dense": tiny_model(), "tokens": windows() % 90, **changes}
    if given["model"] == "dense":
        given["model"] = tiny_model()
    if given["dense"] == "small":
        config = tiny_model().config
        config.vocab_size = 100
        given["dense"] = type(tiny_model())(config)
    with pytest.raises((TypeError, ValueError), match=sentence):
        distill(**given)
    for name, tensor in state(model).items():
        assert_same_bits(tensor, before[name], name)


def test_a_divergence_that_is_not_finite_is_said() -> None:
    model, dense = compressed("shared"), tiny_model()
    with torch.no_grad():
        dense.model.norm.weight.fill_(float("nan"))
    before = state(model)
    with pytest.raises(ValueError, match="divergence from the dense model is nan after 0 steps"):
        distill(model, dense, windows())
    for name, tensor in state(model).items():
        assert_same_bits(tensor, before[name], name)


def test_entries_never_leave_what_can_be_stored() -> None:
    weight = vq_compress(torch.randn(64, 16), torch.ones(16), d=4, bits=1)
    moving = TunedTensors({"one": weight})
    for step in moving.steps.values():
        step.fill_(1e9)
    moved = moving.weight("one")
    assert isinstance(moved, VQWeight)
    for tensor in (moved.codebook, moved.row_norms, moved.col_norms):
        assert torch.isfinite(tensor).all()


def test_mixed_methods_and_dense_linears() -> None:
    model = tiny_model()
    compress(
        model, windows(12, seed=5), ignore=["k_proj"], codebook_scope="kind", **SETTINGS["shared"],
        overrides={"o_proj": {"method": "prune", "pattern": "2:4"}, "down_proj": {"d": 2}},
    )  # fmt: skip
    before = state(model)
    learnt = distill(model, tiny_model(), windows(8), passes=2, learning_rate=1e-2)
    assert learnt.divergences[1] < learnt.divergences[0]
    for name, tensor in model.state_dict().items():
        continuous = ("_norms", "values")
        moves = name.endswith(continuous) or "nowag_codebooks." in name
        assert torch.equal(tensor, before[name]) != moves, name
    assert len(packed(model)) == len(decoder_linears(tiny_model())) - 2


def test_the_callers_model_is_left_as_it_was() -> None:
    model, dense = compressed("shared"), tiny_model().train()
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: one.requires_grad for name, one in model.named_parameters()}
    distill(model, dense, windows(2).int())
    assert {name: one.requires_grad for name, one in model.named_parameters()} == wanted
    assert all(one.grad is None for part in (model, dense) for one in part.parameters())
    assert dense.training
    assert not model.training


def test_a_lossless_model_stays_where_it_is() -> None:
    """Steps are not made of rounding errors."""
    model, same = compressed("prune"), compressed("prune")
    (divergence,) = distill(model, same, windows()).divergences
    assert abs(divergence) < 1e-4


class Flawed(nn.Module):
    """An MLP that writes into what it has computed, or whose gradient is not a number."""

    def __init__(self, mlp: Any, flaw: str) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.flaw = mlp.up_proj, mlp.down_proj, flaw

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        if self.flaw == "nan":
            return self.down_proj(torch.where(h > 0, h.sqrt(), 0.0))
        gate = h.sigmoid()
        y: Tensor = self.down_proj(gate)
        gate.mul_(2)
        return y


@pytest.mark.parametrize(
    ("flaw", "sentence"),
    [
        ("nan", "gradient's sum is nan after 0 steps, not finite: one of the models is damaged"),
        ("writes", "writes into a tensor that its gradient follows from"),
    ],
)
def test_gradients_that_cannot_be(flaw: str, sentence: str) -> None:
    models = []
    for _ in range(2):
        model = tiny_model()
        model.model.layers[1].mlp = Flawed(model.model.layers[1].mlp, flaw)
        models.append(model)
    model, dense = models
    compress(model, windows(12, seed=5), **SETTINGS["shared"])
    before = state(model)
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        distill(model, dense, windows(1))
    for name, tensor in state(model).items():
        assert_same_bits(tensor, before[name], name)


@pytest.mark.parametrize("changed", ["dense head", "norm", "facts"])
def test_nothing_is_taken_from_what_another_model_left(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_step(monkeypatch)
    model, dense = compressed("shared"), tiny_model()
    steps: list[float] = []

    def note(what: str, done: float, total: float) -> None:
        steps.append(done)
        if len(steps) == 5 and what.startswith("distillation"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, dense, windows(), work_dir=tmp_path, progress=note)
    if changed == "facts":
        file = tmp_path / "state.safetensors"
        data = file.read_bytes()
        at = data.index(b'"facts":"[') + 12
        file.write_bytes(data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :])
    else:
        with torch.no_grad():
            (dense if changed == "dense head" else model).model.norm.weight.mul_(1.5)
    steps = [0.0] * 5
    distill(model, dense, windows(), work_dir=tmp_path, progress=note)
    assert steps[5:9] == [0, 1, 0, 1]
