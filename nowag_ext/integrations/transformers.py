"""The ``nowag`` quantizer of transformers: saved models load again after ``import nowag_ext``.

Importing this module registers it. ``config.json`` then holds a ``quantization_config``:

    quant_method    "nowag"
    format_version  of the packed forms (csrc/include/nowag/format.h)
    method          "vq" or "prune"
    groups          [{modules, weight_dtype, and d and code_bits | sparsity | pattern}]
    settings        what the model was compressed with, for the reader's information
    nowag_ext       the release that wrote it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nowag_ext import ops
from nowag_ext.linear import SparseLinear, VQLinear
from nowag_ext.version import __version__

QUANT_METHOD = "nowag"
_PACKED = (VQLinear, SparseLinear)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What safetensors calls the dtypes of the packed forms.
_STORED_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_GROUP_FIELDS = {"vq": [{"d", "code_bits"}], "prune": [{"sparsity"}, {"pattern"}]}


def format_group(
    fields: Mapping[str, Any], dtype: torch.dtype, modules: Sequence[str]
) -> dict[str, Any]:
    """One entry of a config's ``groups``: modules of one form, and the dtype their weights had."""
    return {**fields, "weight_dtype": str(dtype).removeprefix("torch."), "modules": list(modules)}


@register_quantization_config(QUANT_METHOD)
class NowagConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model compressed by nowag_ext (see the module's text).

    Raises:
        ValueError: a format_version this release does not read, or malformed fields.
    """

    def __init__(
        self,
        method: str = "",
        groups: Sequence[dict[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        format_version: int = ops.FORMAT_VERSION,
        nowag_ext: str = __version__,
        **_unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.method = method
        self.groups = groups
        self.settings = dict(settings or {})
        self.nowag_ext = nowag_ext
        if format_version != ops.FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format_version {format_version}, written by nowag_ext "
                f"{nowag_ext}, but this nowag_ext {__version__} reads version "
                f"{ops.FORMAT_VERSION}: install the release that wrote it."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.method not in _GROUP_FIELDS:
            raise ValueError(
                f"quantization_config.method must be vq or prune, not {self.method!r}."
            )
        if not isinstance(self.groups, list | tuple):
            raise ValueError("quantization_config.groups of config.json must be a list.")
        for group in self.groups:
            if not self._is_group(group):
                raise ValueError(
                    "quantization_config.groups of config.json is malformed: a group of method "
                    f"{self.method!r} cannot be {group!r:.200}."
                )

    def _is_group(self, group: Any) -> bool:
        return (
            isinstance(group, dict)
            and set(group) - {"modules", "weight_dtype"} in _GROUP_FIELDS[self.method]
            and group.get("weight_dtype") in _DTYPES
            and isinstance(group.get("modules"), list)
            and all(isinstance(name, str) for name in group["modules"])
        )

    def build(self, group: Mapping[str, Any], linear: nn.Linear) -> VQLinear | SparseLinear:
        """An empty module for ``linear``'s place, on its device, with its bias."""
        size = (linear.in_features, linear.out_features)
        device = linear.weight.device
        module: VQLinear | SparseLinear
        if self.method == "vq":
            d, code_bits = group["d"], group["code_bits"]
            module = VQLinear(*size, d=d, bits=_bits(d, code_bits), device=device)
        else:
            module = SparseLinear(
                *size,
                sparsity=group.get("sparsity"),
                pattern=group.get("pattern"),
                dtype=_DTYPES[group["weight_dtype"]],
                device=device,
            )
        module.bias = linear.bias
        return module


def _bits(d: int, code_bits: int) -> float:
    """Bits per weight, an int where it is one."""
    return code_bits // d if code_bits % d == 0 else code_bits / d


@register_quantizer(QUANT_METHOD)
class NowagHfQuantizer(HfQuantizer):
    """Puts empty packed modules in place before the weights load, and checks them afterwards."""

    requires_calibration = True
    quantization_config: NowagConfig

    def validate_environment(self, *_args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "a nowag model cannot be offloaded to disk: its modules must be loaded."
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> Any:
        for group in self.quantization_config.groups:
            for stored_name in group["modules"]:
                name = _local_name(model, stored_name)
                linear = model.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise ValueError(
                        f"{stored_name} of quantization_config is a {type(linear).__name__} in "
                        "this model, not an nn.Linear: config.json does not fit it."
                    )
                try:
                    module = self.quantization_config.build(group, linear)
                except ValueError as error:
                    raise ValueError(f"{stored_name} of quantization_config: {error}") from None
                model.set_submodule(name, module)
        _check_headers(model, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        _check_all_loaded(model)
        for name, module in model.named_modules():
            if isinstance(module, _PACKED):
                try:
                    module.validate()
                except ValueError as error:
                    raise ValueError(f"{name} in the checkpoint is damaged: {error}") from None
        return model

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Tensors of packed modules keep their dtype, whatever dtype the model is loaded in."""
        for target in getattr(converter, "target_patterns", ()):
            if target.rpartition(".")[2] in _FORMAT_TENSORS:
                return None
        return super().get_new_dtype(converter, param, dtype)

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return replace_by_dense(model, dtype or model.dtype)


_FORMAT_TENSORS = {
    "codes", "codebook", "row_norms", "col_norms", "bitmap", "values", "row_offsets",
}  # fmt: skip


def attach(model: Any, config: NowagConfig) -> None:
    """Marks a model whose modules have been replaced, as ``from_pretrained`` would."""
    model.hf_quantizer = NowagHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config


def replace_by_dense(model: Any, dtype: torch.dtype) -> Any:
    """Replaces every packed module by an ``nn.Linear`` of ``dtype`` with the same weight."""
    packed = {n: module for n, module in model.named_modules() if isinstance(module, _PACKED)}
    for name, module in packed.items():
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(module.weight_form().dequantize(dtype))
        linear.register_parameter("bias", module.bias)
        model.set_submodule(name, linear.train(module.training))
    return model


def _local_name(model: Any, name: str) -> str:
    """The module's name in this model, which may be the body of the one that was saved."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ValueError(f"{name} of quantization_config is no module of this {type(model).__name__}.")


def _check_headers(model: Any, files: Iterable[str]) -> None:
    """Raises ValueError, before anything is loaded, for a broken file or a tensor unfit for it.

    Every tensor must have the module's shape, and a packed module's its dtype too: transformers may
    convert it in silence. Tensors that transformers renames while loading are left to its checks.
    """
    expected = dict(model.state_dict())
    packed = {name for name, module in model.named_modules() if isinstance(module, _PACKED)}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in expected:
                        fixed = name.rpartition(".")[0] in packed and not name.endswith(".bias")
                        _check_header(opened.get_slice(name), expected[name], fixed, name, file)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged: {error}.") from None


def _check_header(stored: Any, expected: torch.Tensor, fixed: bool, name: str, file: str) -> None:
    """Raises ValueError unless a stored tensor has the shape, and if ``fixed`` the dtype, asked."""
    shape = tuple(stored.get_shape())
    if shape != tuple(expected.shape):
        raise ValueError(
            f"{name} in {file} has shape {shape}, but the configuration asks for "
            f"{tuple(expected.shape)}."
        )
    dtype = stored.get_dtype()
    if fixed and dtype != _STORED_DTYPES[expected.dtype]:
        raise ValueError(
            f"{name} in {file} is {dtype}, but the format asks for "
            f"{_STORED_DTYPES[expected.dtype]}."
        )


def _check_all_loaded(model: Any) -> None:
    """Raises ValueError if a tensor was not in the checkpoint: transformers only warns of those."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "_is_hf_initialized", False) and name not in tied
    ]
    missing = [n for n in missing if not any(re.search(pattern, n) for pattern in optional)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the checkpoint is incomplete: it has no tensor {missing[0]}{more}.")
