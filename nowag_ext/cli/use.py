"""``nowag-ext eval``, ``generate`` and ``env``."""

from __future__ import annotations

from nowag_ext.cli import options
from nowag_ext.cli.base import advise_dtype, app, err, out, reported
from nowag_ext.cli.texts import open_texts
from nowag_ext.disk import of_argument
from nowag_ext.environment import describe_environment, named_device
from nowag_ext.evaluate import perplexity, split_windows
from nowag_ext.generate import check_generation, encode_prompt
from nowag_ext.generate import generate as generate_text
from nowag_ext.render import dtype_name, environment_tables, loading, progress_bar
from nowag_ext.source import open_model, open_tokenizer


@app.command("eval")
@reported
def evaluate(
    model: options.Model,
    text: options.Text,
    window: options.Window = 1024,
    windows: options.Windows = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Perplexity of a model, compressed or dense, on a text file."""
    place = named_device(device)
    (document,) = open_texts([text])
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    with of_argument("text"):
        tokens = document.tokens(tokenizer, None if windows is None else windows * window)
    split_windows(tokens, window, windows)  # raises for what cannot be, before weights are read
    with loading(err, model):
        loaded, _ = open_model(
            model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        loaded.to(place)
    advise_dtype(loaded, "nowag-ext eval --dtype float32")
    with progress_bar(err) as progress:
        result = perplexity(loaded, tokens, window=window, windows=windows, progress=progress)
    out.print(f"perplexity {result.perplexity:.4f}")
    out.print(f"{result.protocol()}; {dtype_name(loaded.dtype)} on {place}; {text}", soft_wrap=True)


@app.command()
@reported
def generate(
    model: options.Model,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 64,
    chat: options.Chat = False,
    temperature: options.Temperature = 0.0,
    seed: options.GenerationSeed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Text from a model, compressed or dense, and its speed."""
    check_generation(max_new_tokens, temperature)
    place = named_device(device)
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    with loading(err, model):
        loaded, _ = open_model(
            model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        loaded.to(place)
    run = generate_text(
        loaded, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        show=lambda text: out.print(text, end="", soft_wrap=True),
    )  # fmt: skip
    out.print()
    err.print(
        f"{run.tokens} tokens in {run.seconds:.2f} s: {run.tokens_per_second:.1f} tokens/s, "
        f"reading the {ids.shape[1]} of the prompt included; {dtype_name(loaded.dtype)} on {place}",
        soft_wrap=True,
    )


@app.command()
@reported
def env() -> None:
    """Versions, which backends run, what is missing and how to get it."""
    environment = describe_environment()
    for part in environment_tables(environment):
        out.print(part)
    for sentence in environment.missing:
        out.print(f"- {sentence}", soft_wrap=True)
    if not environment.missing:
        out.print("Nothing is missing.")
