"""Python's arguments as the command line calls them, and errors as sentences that do."""

from __future__ import annotations

import os
import re
from typing import Any

# Of Python's arguments those that a sentence may begin with or that can be nothing else.
_ARGUMENTS = re.compile(
    r"^(bits|checkpoint_format|codebook_scope|d|dtype|ignore|init|iters|learning_rate"
    r"|max_new_tokens|method|min_coverage|n_init|passes|pattern|recipe|seed|sparsity|temperature)"
    r"(?= must | names )"
    r"|^head(?=: )"
    r"|\b(codebook_scope|max_new_tokens|min_coverage|n_init)\b"
)
# Options that are not called as the argument is.
_OPTIONS = {
    "model": "MODEL", "compressed": "COMPRESSED", "overrides": "--override",
    "checkpoint_format": "--format",
    **{name: name for name in ("nowag_ext", "torch", "processes", "OMP_NUM_THREADS")},
}  # fmt: skip
_LONGEST = 400  # characters of a refusal; libraries list all models that they know


def _option(argument: str) -> str:
    return _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


def one_sentence(error: Exception) -> str:
    """What an error says, in one line that names options."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    # Of a long list of what there could be the beginning of the sentence before it is enough.
    text = text.partition(" Model type should be one of ")[0]
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... (all of it: nowag-ext --traceback)"
    text = _ARGUMENTS.sub(lambda m: _option(m.group()), text)
    argument = getattr(error, "argument", None)
    if argument is not None and not text.startswith(_option(argument)):
        text = f"{_option(argument)}: {text}"
    expected = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError))
    return text if text and expected else f"{type(error).__name__}: {text}"


def named_options(made_with: dict[str, Any]) -> dict[str, Any]:
    """By option what was by argument."""
    return {_option(name): value for name, value in made_with.items()}
