"""The ``nowag`` quantizer of transformers: saved models load again after ``import nowag_ext``.

Importing this module registers it. ``config.json`` then holds a ``quantization_config``:

    quant_method    "nowag"
    format_version  of all this and of the packed forms (csrc/include/nowag/format.h): 2
    groups          linears of one form, each {
        method          "vq" or "prune"
        modules         their names
        weight_dtype    of the dense weights they stand for
        d, code_bits | sparsity | pattern
        codebook        vq: the name of the codebook they share; without it each has its own
        settings        what they were compressed with, for the reader's information
    }
    nowag_ext       the release that wrote it

Version 1 had one method and one set of settings beside the groups, and no shared codebooks. It is
read, and written back as version 2.

A shared codebook is stored once, as ``nowag_codebooks.<name>`` of the base model.
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
from nowag_ext.codebook import OWNER, adopt_codebooks, disown_codebooks, tie_codebooks
from nowag_ext.linear import PackedLinear
from nowag_ext.methods import METHODS
from nowag_ext.version import __version__

QUANT_METHOD = "nowag"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What safetensors calls the dtypes of the packed forms.
_STORED_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_READS = (1, 2)  # format versions


def format_group(
    method: str,
    form: Mapping[str, Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    modules: Sequence[str],
) -> dict[str, Any]:
    """One entry of a config's ``groups`` (see the module's text)."""
    name = str(dtype).removeprefix("torch.")
    return {
        "method": method,
        **form,
        "weight_dtype": name,
        "settings": dict(settings),
        "modules": list(modules),
    }


@register_quantization_config(QUANT_METHOD)
class NowagConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model compressed by nowag_ext (see the module's text).

    Raises:
        ValueError: a format_version this release does not read, or malformed fields.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]] = (),
        format_version: int = ops.FORMAT_VERSION,
        nowag_ext: str = __version__,
        method: str | None = None,
        settings: Mapping[str, Any] | None = None,
        **_unknown: Any,
    ) -> None:
        if format_version not in _READS:
            raise ValueError(
                f"the checkpoint has format_version {format_version}, written by nowag_ext "
                f"{nowag_ext}, but this nowag_ext {__version__} reads versions "
                f"{' and '.join(map(str, _READS))}: install the release that wrote it."
            )
        if not isinstance(groups, list | tuple):
            raise ValueError("quantization_config.groups of config.json must be a list.")
        if format_version == 1:
            groups = [_from_version_1(group, method, settings) for group in groups]
        for group in groups:
            _check_group(group)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = ops.FORMAT_VERSION
        self.groups = list(groups)
        self.nowag_ext = nowag_ext

    def build(self, group: Mapping[str, Any], linear: nn.Linear) -> PackedLinear:
        """An empty module for ``linear``'s place, on its device, with its bias."""
        module = METHODS[group["method"]].empty(
            group,
            linear.in_features,
            linear.out_features,
            _DTYPES[group["weight_dtype"]],
            linear.weight.device,
        )
        module.bias = linear.bias
        return module


def _from_version_1(
    group: Any, method: str | None, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    if not isinstance(group, dict):
        raise ValueError(f"a group of quantization_config must be an object, not {group!r:.200}.")
    return {**group, "method": method, "settings": dict(settings or {})}


_EVERY_GROUP = {"method", "weight_dtype", "modules", "settings"}


def _check_group(group: Any) -> None:
    """Raises ValueError for a group that no release writes."""
    if not isinstance(group, dict):
        raise ValueError(f"a group of quantization_config must be an object, not {group!r:.200}.")
    method = group.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"the method of a group of quantization_config must be {' or '.join(METHODS)}, "
            f"not {method!r:.200}."
        )
    if not _is_group(group):
        raise ValueError(
            f"quantization_config.groups of config.json is malformed: it holds {group!r:.200}."
        )


def _is_group(group: Mapping[str, Any]) -> bool:
    return (
        set(group) - _EVERY_GROUP in METHODS[group["method"]].forms
        and str(group.get("weight_dtype")) in _DTYPES
        and isinstance(group.get("settings", {}), dict)
        and isinstance(group.get("modules"), list)
        and all(isinstance(name, str) for name in group["modules"])
    )


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
        adopt_codebooks(model)
        _check_headers(model, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        _check_all_loaded(model)
        tie_codebooks(model)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                for parameter in module.packed_parameters().values():
                    parameter.requires_grad_(False)  # transformers wants one of all that is float
                try:
                    module.validate()
                except ValueError as error:
                    raise ValueError(f"{name} in the checkpoint is damaged: {error}") from None
        return model

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """A map of the dense model's modules says nothing of the codebooks: they go anywhere."""
        if isinstance(device_map, dict) and device_map and "" not in device_map:
            shared = any("codebook" in group for group in self.quantization_config.groups)
            if shared and not any(OWNER in name for name in device_map):
                return {**device_map, OWNER: next(iter(device_map.values()))}
        return device_map

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Tensors of packed modules keep their dtype, whatever dtype the model is loaded in."""
        for target in getattr(converter, "target_patterns", ()):
            if target.rpartition(".")[2] in _FORMAT_TENSORS or OWNER in target.split("."):
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
    packed = {n: module for n, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, module in packed.items():
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(module.weight_form().dequantize(dtype))
        linear.register_parameter("bias", module.bias)
        model.set_submodule(name, linear.train(module.training))
    disown_codebooks(model)
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
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in expected:
                        fixed = OWNER in name.split(".") or (
                            name.rpartition(".")[0] in packed and not name.endswith(".bias")
                        )
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
