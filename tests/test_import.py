"""What importing the package costs, and that transformers knows of it either way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fresh_process import fresh_python

DATA = Path(__file__).parent / "data"


def python(code: str) -> str:
    return subprocess.run(**fresh_python("-c", code), capture_output=True, check=True).stdout


def test_one_layer_needs_no_transformers() -> None:
    python(
        "import sys, torch, nowag_ext, nowag_ext.ops\n"
        "w, a = torch.randn(64, 64), torch.ones(64)\n"
        "vq = nowag_ext.vq_compress(w, a, d=4, bits=1.5, iters=2)\n"
        "nowag_ext.VQLinear.from_weight(vq)(w)\n"
        "nowag_ext.prune(w, a)\n"
        "assert 'transformers' not in sys.modules\n"
        "assert set(nowag_ext.__all__) <= set(dir(nowag_ext))\n"
        "assert callable(nowag_ext.compress_model)\n"
        "assert 'transformers' in sys.modules\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        # Somebody looks where the registry is, without importing it.
        "import nowag_ext, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')"
        "; from transformers import AutoModelForCausalLM",
        pytest.param(
            "import nowag_ext; from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from transformers import AutoModelForCausalLM; import nowag_ext",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import transformers.quantizers.auto, nowag_ext; "
            "from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_transformers_reads_checkpoints_after_the_import(imports: str) -> None:
    printed = python(
        f"{imports}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(DATA / 'v1_vq')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert printed == "VQLinear\n"


def test_unknown_names_are_refused_as_ever() -> None:
    import nowag_ext

    with pytest.raises(AttributeError, match="module 'nowag_ext' has no attribute 'nothing'"):
        _ = nowag_ext.nothing
