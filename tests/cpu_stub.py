"""Writes ``nowag_ext/_cpu.pyi`` from what the compiled module says of itself.

``python tests/cpu_stub.py`` after the list of operations, their parameters or the constants
changed; ``tests/test_bindings.py`` fails as long as the file is another.
"""

from __future__ import annotations

import re
from pathlib import Path

from nowag_ext import _cpu

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "nowag_ext" / "_cpu.pyi"
INCLUDE = ROOT / "csrc" / "include" / "nowag"
LINE_LENGTH = 100

HEADER = '''"""The compiled CPU kernels (csrc/bindings); nowag_ext.ops alone calls them.

Written by tests/cpu_stub.py. Addresses, sizes and the numbers of enumerators are integers.
"""

from collections.abc import Sequence
from typing import Protocol, type_check_only
'''

PROTOCOL = '''
@type_check_only
class Kernels(Protocol):
    """What every backend offers: queue is the number of threads, or a device's stream."""
'''


def operations() -> list[str]:
    """The names in the list of operations."""
    listed = (INCLUDE / "operations.h").read_text()
    return re.findall(r"^    EACH\(\w+, (\w+)\)", listed, re.MULTILINE)


def functions() -> dict[str, str]:
    """Signatures by name: ``name(parameter: type, ...) -> type``."""
    return {
        name: str(value.__doc__).strip()
        for name, value in vars(_cpu).items()
        if callable(value) and not name.startswith("_")
    }


def constants() -> dict[str, str]:
    """Types by name."""
    return {
        name: type(value).__name__
        for name, value in vars(_cpu).items()
        if not callable(value) and not name.startswith("_")
    }


def declaration(signature: str, *, method: bool = False) -> str:
    """``signature`` as a stub has it: without keywords, on lines as ruff breaks them."""
    match = re.fullmatch(r"(\w+)\((.*)\) -> (\w+)", signature)
    assert match is not None, signature
    name, listed, result = match.groups()
    parameters = re.findall(r"\w+: [^,\[]+(?:\[.*\])?", listed)
    if parameters:
        parameters.append("/")
    indent = ""
    if method:
        indent = "    "
        parameters = ["self", *parameters]
        parameters[-2] = "queue: int"
    line = f"{indent}def {name}({', '.join(parameters)}) -> {result}: ..."
    if len(line) > LINE_LENGTH:
        broken = "".join(f"{indent}    {parameter},\n" for parameter in parameters)
        line = f"{indent}def {name}(\n{broken}{indent}) -> {result}: ..."
    return line + "\n"


def text() -> str:
    """The stub of the module as it is compiled now."""
    values = "".join(f"{name}: {kind}\n" for name, kind in sorted(constants().items()))
    signatures = functions()
    return "".join(
        [
            HEADER,
            "\n",
            values,
            "\n",
            *(declaration(signature) for signature in signatures.values()),
            PROTOCOL,
            "\n",
            *(declaration(signatures[name], method=True) for name in operations()),
        ]
    )


if __name__ == "__main__":
    STUB.write_text(text())
    print(f"wrote {STUB}")
