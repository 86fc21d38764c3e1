"""Perplexity, KL and the token-by-token check against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import TEXT, tiny_llama, tiny_tokenizer

from nowag_ext.evaluate import (
    compare_with_dense,
    perplexity,
    split_windows,
    teacher_forced_check,
    tokenize,
)
from nowag_ext.generate import encode_prompt, generate, tokens_per_second

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tokenize(tiny_tokenizer(), TEXT)


def test_tokenize_adds_nothing(tokens: torch.Tensor) -> None:
    assert tokens.numel() == len(TEXT.encode())
    assert tiny_tokenizer().decode(tokens.tolist()) == TEXT


def test_tokenize_refuses_an_empty_text() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        tokenize(tiny_tokenizer(), "")


def test_windows_do_not_overlap_and_drop_the_tail() -> None:
    windows = split_windows(torch.arange(23), 5)
    assert windows.tolist() == torch.arange(20).view(4, 5).tolist()
    assert split_windows(torch.arange(23), 5, 2).tolist() == windows[:2].tolist()
    assert split_windows(torch.arange(23), 5, 99).shape == (4, 5)


@pytest.mark.parametrize(
    ("window", "windows", "sentence"),
    [(1, None, "at least 2 tokens"), (4, 0, "at least 1"), (24, None, "23 tokens, less than one")],
)
def test_windows_refuse(window: int, windows: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        split_windows(torch.arange(23), window, windows)


def test_perplexity_is_the_formula(tokens: torch.Tensor) -> None:
    model, seen = tiny_llama(), []
    result = perplexity(
        model, tokens, window=37, windows=3, progress=lambda *told: seen.append(told)
    )
    total = 0.0
    for start in (0, 37, 74):
        window = tokens[start : start + 37]
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i, window[i + 1]]) for i in range(36))
    assert math.isclose(result.perplexity, math.exp(total / 108), rel_tol=1e-5)
    assert (result.window, result.windows, result.predicted) == (37, 3, 108)
    assert "first 3 non-overlapping windows of 37 tokens" in result.protocol()
    assert seen == [("perplexity", done, 3) for done in (1, 2, 3)]


def test_perplexity_across_position_chunks(tokens: torch.Tensor) -> None:
    """A window longer than the chunk in which logits are turned into likelihoods."""
    model = tiny_llama()
    with torch.no_grad():
        logits = model(tokens[None, :300]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:300]).exp()
    assert math.isclose(
        perplexity(model, tokens, window=300, windows=1).perplexity, float(expected), rel_tol=1e-5
    )


def test_perplexity_refuses_a_model_of_nan(tokens: torch.Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="nan, not a finite number"):
        perplexity(model, tokens, window=16, windows=1)


def test_perplexity_keeps_the_training_mode(tokens: torch.Tensor) -> None:
    model = tiny_llama().train()
    perplexity(model, tokens, window=16, windows=1)
    assert model.training


def test_kl_is_the_formula(tokens: torch.Tensor) -> None:
    dense, model = tiny_llama(0), tiny_llama(1)
    with torch.no_grad():
        p = dense(tokens[:300].view(2, 150)).logits.double().log_softmax(-1)
        q = model(tokens[:300].view(2, 150)).logits.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    result = compare_with_dense(model, dense, tokens, window=150, windows=2)
    assert expected > 0.1
    assert math.isclose(result.kl_divergence, expected, rel_tol=1e-5)
    assert result.perplexity == perplexity(model, tokens, window=150, windows=2)
    same = compare_with_dense(dense, dense, tokens, window=150, windows=2)
    assert abs(same.kl_divergence) < 1e-6


def test_teacher_forced_check_agrees_with_itself(tokens: torch.Tensor) -> None:
    model, seen = tiny_llama(), []
    check = teacher_forced_check(model, tokens, count=40, progress=lambda *told: seen.append(told))
    one_pass = perplexity(model, tokens, window=40, windows=1)
    assert math.isclose(check.nll_one_pass, math.log(one_pass.perplexity), rel_tol=1e-6)
    assert check.relative_difference < 1e-5
    assert check.argmax_agreement == 1.0
    assert check.tokens == 40
    assert seen[-1] == ("token by token", 40, 40)


def test_teacher_forced_check_sees_a_broken_gemv(tokens: torch.Tensor) -> None:
    """A layer that differs for a single token, as a wrong gemv kernel would, must show."""
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: -output if args[0].shape[-2] == 1 else output
    )
    check = teacher_forced_check(model, tokens, count=40)
    assert check.relative_difference > 1e-3
    assert check.argmax_agreement < 0.99


def test_teacher_forced_check_needs_enough_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="less than one window of 40"):
        teacher_forced_check(tiny_llama(), tokens[:39], count=40)


def test_generate_is_greedy() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompt = encode_prompt(tokenizer, "It was", chat=False)
    pieces: list[str] = []
    run = generate(
        model, tokenizer, prompt, max_new_tokens=12, fixed_length=True, show=pieces.append
    )
    assert "".join(pieces) == run.text
    assert len(pieces) > 1
    ids = prompt[0].tolist()
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[0] = -math.inf  # the end of the text, which a fixed length forbids
        ids.append(int(logits.argmax()))
    assert run.text == tokenizer.decode(ids[prompt.shape[1] :], skip_special_tokens=True)
    assert run.tokens == 12
    assert run.tokens_per_second == run.tokens / run.seconds
    assert tokens_per_second(model, tokenizer, prompt, new_tokens=4, warmup=1) > 0


def test_generate_refuses() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(tokenizer, "", chat=False)
    prompt = encode_prompt(tokenizer, "It", chat=False)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        generate(model, tokenizer, prompt, max_new_tokens=0)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tokenizer, "It", chat=True)


def test_chat_prompt_uses_the_template() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, "Hello", chat=True)[0].tolist()
    assert tokenizer.decode(ids) == "<user>Hello\n<assistant>"
