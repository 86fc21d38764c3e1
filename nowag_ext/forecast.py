"""What a run will write, from the model's configuration alone: before weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nowag_ext.codebook import OWNER
from nowag_ext.decoder import decoder_linears, matches
from nowag_ext.gguf_source import gguf_config
from nowag_ext.methods import METHODS, LayerSettings, VQSettings
from nowag_ext.packed import vq_form
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.plan_head import plan_head
from nowag_ext.stored import checked_config
from nowag_ext.vq import check_code


def skeleton(source: str | os.PathLike[str], dtype: torch.dtype | str) -> Any:
    """The model without its weights, on the meta device.

    None where only loading it tells: models that bring their own code.

    Raises:
        OSError: there is no such model.
        ValueError: it is quantised or damaged, or transformers knows none of its kind.
    """
    if Path(source).is_file():
        built = gguf_config(Path(source))
        dtype = torch.float32 if dtype == "auto" else dtype
    else:
        config = checked_config(source)
        if config.get("quantization_config") is not None:
            raise ValueError(f"{os.fspath(source)} is already quantised: a dense model is needed.")
        if "auto_map" in config or "model_type" not in config:
            return None
        built = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if dtype == "auto":
        # Where the configuration names none the weights do: no more than they may take is told.
        dtype = getattr(built, "dtype", None) or torch.float16
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(built, dtype=dtype)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a compression writes.

    Attributes:
        checkpoint: of the safetensors files of the output.
        tensors: of the tensors in them.
        compressed: of the tensors that stand for the decoder's compressed weights, packed.
        weights: how many weights those are.
        head: of the tensors that stand for a packed head.
    """

    checkpoint: int
    tensors: int
    compressed: int
    weights: int
    head: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed weights, everything stored for them counted."""
        return 8 * self.compressed / self.weights if self.weights else 0.0

    @property
    def written(self) -> int:
        """Of the tensors on disk when a compression ends: finished layers and the checkpoint."""
        return self.tensors + self.compressed + self.head


def sizes(
    model: Any,
    settings: LayerSettings,
    ignore: Sequence[str],
    codebook_scope: str,
    head: VQSettings | None = None,
    *,
    dense: bool,
) -> Sizes:
    """What compressing a model, or its skeleton, writes; ``dense``: as an ordinary checkpoint."""
    codebooks = SharedCodebooks(codebook_scope)
    tensors = {**model.state_dict(), **dict(model.named_parameters(remove_duplicate=False))}
    # Tied parameters are one, and stored once.
    stored = {id(tensor): name for name, tensor in reversed(tensors.items())}
    dense_form = {name: tensors[name] for name in stored.values()}
    packed: dict[str, Tensor] = {}
    replaced = set()
    weights = 0
    for name, linear in decoder_linears(model).items():
        if matches(name, ignore):
            continue
        one = settings.of(name)
        form = one.form()
        if isinstance(one, VQSettings) and codebook_scope != "layer":
            form["codebook"] = codebooks.name_for(name, one)
            entries = torch.empty(
                1 << check_code(one.d, one.bits), one.d, dtype=torch.float16, device="meta"
            )
            packed[f"{OWNER}.{form['codebook']}"] = entries
        module = METHODS[one.method].empty(
            form, linear.in_features, linear.out_features, linear.weight.dtype, torch.device("meta")
        )
        packed |= {f"{name}.{part}": tensor for part, tensor in module.named_parameters()}
        replaced.add(f"{name}.weight")
        weights += linear.weight.numel()
    packed_head: dict[str, Tensor] = {}
    if head is not None:
        plan = plan_head(model, head)
        owner = plan.embedding or plan.name
        packed_head = {
            f"{owner}.{part}": torch.empty(shape, dtype=kind, device="meta")
            for part, (shape, kind) in vq_form(
                *plan.unit.shape, head.d, check_code(head.d, head.bits)
            ).items()
        }
        replaced |= {f"{plan.name}.weight", f"{owner}.weight"}
    others = {name: tensor for name, tensor in dense_form.items() if name not in replaced}
    written = dense_form if dense else {**others, **packed, **packed_head}
    total = _bytes(written)
    return Sizes(
        _header_bytes(written) + total, total, _bytes(packed), weights, _bytes(packed_head)
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What a safetensors file of these tensors has before them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    return 8 + len(json.dumps(header, separators=(",", ":")))
