"""Options of the command line, by the name of the parameter they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_NUMBERS: dict[str, Callable[[str], int | float]] = {
    "d": int, "iters": int, "n_init": int, "seed": int, "sparsity": float,
    "bits": lambda text: int(text) if text.isdecimal() else float(text),
}  # fmt: skip


def parse_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """'PATTERN NAME=VALUE ...' -> the overrides of ``compress_model``; raises ValueError."""
    overrides = {}
    for text in texts:
        pattern, *assignments = text.split() or [""]
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            try:
                values[name] = _NUMBERS.get(name, str)(value)
            except ValueError:
                equals = ""
            if not equals:
                raise ValueError(
                    f"--override {text!r} must be a pattern and NAME=VALUE after it, "
                    f"but {assignment!r} is none."
                )
        if not values:
            raise ValueError(f"--override {text!r} names no setting: 'down_proj bits=3' does.")
        overrides[pattern] = values
    return overrides


def parse_samples(text: str) -> int | None:
    """A number of windows, or None for auto; raises ValueError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--samples must be a number of at least 1, or auto, not {text!r}.")
    return int(text)


def parse_head(text: str) -> dict[str, Any]:
    """ "2,4" -> {"d": 2, "bits": 4}; raises ValueError."""
    try:
        d, bits = text.split(",")
        settings = {"d": int(d), "bits": whole(float(bits))}
    except ValueError:
        raise ValueError(f"--head must be D,BITS such as 2,4, not {text!r}.") from None
    return settings


def whole(value: float) -> float:
    """An int, where a number is one."""
    return int(value) if value.is_integer() else value


MODEL_HELP = "A directory, a hub id or a .gguf file."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Text = Annotated[
    Path, typer.Option(help="UTF-8 text file, - for standard input.", show_default=False)
]
Texts = Annotated[
    list[Path],
    typer.Option(
        "--text",
        help="UTF-8 text file, - for standard input; repeatable, mixed evenly.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, float16, bfloat16, or auto: as in the checkpoint (float32 for .gguf)."
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:N, or auto: the first CUDA device, if there is one that this build "
        "has kernels for."
    ),
]

CompressDevice = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where all is computed, and what is not on disk is: cpu, cuda, cuda:N, or auto. Under "
        "torchrun each process takes a cuda device of its own.",
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that MODEL brings, if it brings any."
    ),
]

# Calibration
StatisticsFile = Annotated[
    Path, typer.Option("--output", "-o", help="File of statistics to write.", show_default=False)
]
Samples = Annotated[int, typer.Option(help="Calibration: windows of text to read.")]
Length = Annotated[int, typer.Option(help="Calibration: tokens a window.")]
SampleSeed = Annotated[
    int | None,
    typer.Option(help="Calibration: take windows at random; without it, the first ones."),
]

# Compression
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)
]
ActNorms = Annotated[
    Path | None, typer.Option(help="File that `calibrate` wrote.", show_default=False)
]
CalibrationTexts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="UTF-8 text to calibrate on, without --act-norms; repeatable, mixed evenly. For those "
        "who have none: python-docs, half of Python's own language reference. self: what the dense "
        "model writes, for those who have little.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="feedback: block by block, each layer making up for the errors before it (default "
        "with --text); paper: every layer alone, from its activation norms."
    ),
]
CodebookScope = Annotated[
    str | None,
    typer.Option(help="vq: a codebook for the model (default), for each kind, or each layer."),
]
Head = Annotated[
    str | None,
    typer.Option(
        metavar="D,BITS", help="Pack lm_head, and a tied embedding with it: 2,4 say.",
        show_default=False,
    ),
]  # fmt: skip
CompressSamples = Annotated[
    str | None,
    typer.Option(
        "--samples",
        metavar="N|auto",
        help="Calibration: windows of text to read (default 32, with --recipe paper 128); auto: as "
        "many as --minutes are enough for on this machine, but no fewer.",
    ),
]
CompressDistill = Annotated[
    int | None,
    typer.Option(
        "--distill",
        min=0,
        help="Windows of 512 tokens, of what calibration leaves of the text, to tune the result "
        "on, as `distill` does (default 48; with --method prune or --recipe paper 0).",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(help="With --samples auto: how long the run may take (default 10)."),
]
Method = Annotated[str, typer.Option(help="vq or prune.")]
Subvector = Annotated[
    int | None, typer.Option("--d", help="vq: weights a code stands for, 1 to 8 (default 6).")
]
Bits = Annotated[
    float | None,
    typer.Option(help="vq: bits per weight; d * bits is an integer up to 16 (default 2)."),
]
Iters = Annotated[
    int | None,
    typer.Option(help="vq: most k-means iterations (default 100; a shared codebook takes 30)."),
]
NInit = Annotated[
    int | None, typer.Option(help="vq: starts, of which the best is kept (default 1).")
]
Init = Annotated[str | None, typer.Option(help="vq: kmeans++ or random (default kmeans++).")]
Seed = Annotated[int | None, typer.Option(help="vq: seed of the starting codebook (default 0).")]
Sparsity = Annotated[
    float | None, typer.Option(help="prune: share of each layer's weights to prune (default 0.5).")
]
Pattern = Annotated[
    str | None,
    typer.Option(help="prune: N:M, keep N of M consecutive inputs; instead of --sparsity."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Layer to leave dense: name, last part of it, or re:PATTERN; repeatable."),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'PATTERN NAME=VALUE ...'",
        help="Other settings for the layers that PATTERN names, as in --ignore: 'down_proj "
        "bits=3', 'o_proj method=prune pattern=2:4'; repeatable, the last that names one counts.",
    ),
]
MinCoverage = Annotated[
    float, typer.Option(help="Refuse if less of the decoder's weights can be compressed.")
]
Format = Annotated[
    str, typer.Option("--format", help="nowag (packed), or dense: loads anywhere, not smaller.")
]
Resume = Annotated[
    bool,
    typer.Option(
        help="Go on from what an earlier run has left in OUTPUT.partial, where finished work is "
        "kept until the output is whole; --no-resume removes it first."
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, writable=True,
        help="A directory for the hidden states of the calibration text, which are otherwise in "
        "memory: twice 4 bytes for each token and hidden unit. They leave nothing there.",
    ),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what it would take (bits, bytes, memory, time) and do nothing: from MODEL's "
        "configuration, and the speed of this machine, measured for some seconds.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUTPUT, if nowag_ext wrote all that is in it."),
]

# Distillation
Compressed = Annotated[
    str,
    typer.Argument(
        metavar="COMPRESSED",
        help="A directory or hub id of a compressed model.",
        show_default=False,
    ),
]
Dense = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help=f"The dense model to learn from: that which was compressed, or a better one with the "
        f"same tokens. {MODEL_HELP}",
        show_default=False,
    ),
]
DistillTexts = Annotated[
    list[Path],
    typer.Option(
        "--text",
        help="UTF-8 text to learn from; repeatable, mixed evenly.",
        show_default=False,
    ),
]
DistillSamples = Annotated[int, typer.Option("--samples", help="Windows of text to learn from.")]
DistillSampleSeed = Annotated[
    int | None,
    typer.Option(
        "--sample-seed", help="Take windows of the text at random; without it, the first ones."
    ),
]
DistillOffload = Annotated[
    Path | None,
    typer.Option(
        "--offload", exists=True, file_okay=False, writable=True,
        help="A directory for the dense model's hidden states, which are otherwise in memory: 4 "
        "bytes for each token and hidden unit. They leave nothing there.",
    ),
]  # fmt: skip
Skip = Annotated[
    int,
    typer.Option(
        help="Tokens of each text to leave out first: what COMPRESSED was calibrated on, which it "
        "fits already. By default compress reads 57344 of one text."
    ),
]
DistillLength = Annotated[int, typer.Option("--length", help="Tokens a window.")]
Passes = Annotated[int, typer.Option(help="How often the text is gone through.")]
LearningRate = Annotated[
    float, typer.Option(help="The largest, in relative terms: it rises for 5 steps, then falls.")
]
OrderSeed = Annotated[int, typer.Option("--seed", help="Of the order of the windows.")]

# Evaluation and generation
Window = Annotated[int, typer.Option(help="Tokens a window.")]
Windows = Annotated[
    int | None, typer.Option(help="Windows to read from the start of the text; without it, all.")
]
Prompt = Annotated[str, typer.Option(help="Text to go on from.", show_default=False)]
Temperature = Annotated[
    float, typer.Option(help="Tokens are drawn at it; at 0 each is the most likely one.")
]
GenerationSeed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
]

# Demo
DemoModel = Annotated[
    str | None,
    typer.Option(help=f"{MODEL_HELP} Without it: SmolLM2-135M-Instruct.", show_default=False),
]
DemoOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Directory for checkpoints and demo.json.")
]
Fast = Annotated[bool, typer.Option("--fast", help="A quarter of the text and of the iterations.")]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Show where in the code an error came from.")
]
