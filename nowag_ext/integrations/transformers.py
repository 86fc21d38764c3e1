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
        embedding       vq, where the one module is a head: the embedding that is tied to it
        settings        what they were compressed with, for the reader's information
    }
    nowag_ext       the release that wrote it

Version 1 had one method and one set of settings beside the groups, and no shared codebooks. It is
read, and written back as version 2.

A shared codebook is stored once, as ``nowag_codebooks.<name>`` of the base model, and what a head
and its embedding have in common once, as the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nowag_ext import ops
from nowag_ext.codebook import (
    OWNER,
    Codebooks,
    adopt_codebooks,
    disown_codebooks,
    tie_codebooks,
)
from nowag_ext.embedding import VQEmbedding, tie_head, untie_head
from nowag_ext.groups import DTYPES, checked_groups
from nowag_ext.linear import PackedLinear
from nowag_ext.methods import METHODS
from nowag_ext.offload import bring_back, take_hooks
from nowag_ext.packed import PackedModule
from nowag_ext.plan import check_finite
from nowag_ext.stored import check_files, shown
from nowag_ext.version import __version__
from nowag_ext.weight_reads import weight_readers, weight_readers_text

QUANT_METHOD = "nowag"
# What safetensors calls the dtypes of the packed forms.
_STORED_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_READS = (1, 2)  # format versions
_FIELDS = ("groups", "format_version", "nowag_ext", "method", "settings")


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
        if not isinstance(nowag_ext, str):
            raise ValueError(
                f"quantization_config.nowag_ext of config.json must be a release, "
                f"not {shown(nowag_ext)}."
            )
        if type(format_version) is not int or format_version not in _READS:
            raise ValueError(
                f"the checkpoint has format_version {shown(format_version)}, written by nowag_ext "
                f"{nowag_ext:.40}, but this nowag_ext {__version__} reads versions "
                f"{' and '.join(map(str, _READS))}: install the release that wrote it."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = ops.FORMAT_VERSION
        self.groups = checked_groups(groups, format_version, method, settings)
        self.nowag_ext = nowag_ext

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The configuration of a ``quantization_config``, whose other fields are passed over."""
        known = {name: config_dict[name] for name in _FIELDS if name in config_dict}
        return super().from_dict(known, return_unused_kwargs, **kwargs)

    def build(self, group: Mapping[str, Any], linear: nn.Linear) -> PackedLinear:
        """An empty module for ``linear``'s place, on its device, with its bias."""
        module = METHODS[group["method"]].empty(
            group,
            linear.in_features,
            linear.out_features,
            DTYPES[group["weight_dtype"]],
            linear.weight.device,
        )
        module.bias = linear.bias
        return module


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
        if model.dtype not in DTYPES.values():
            raise ValueError(
                f"a nowag model is loaded in {', '.join(DTYPES)}, not in "
                f"{str(model.dtype).removeprefix('torch.')}."
            )
        files = checkpoint_files or ()
        check_files(files, model.config.name_or_path)
        self._put_in_place(model)
        adopt_codebooks(model)
        _check_headers(model, files)
        readers = weight_readers(model, _packed(model))
        if readers:
            raise ValueError(f"{weight_readers_text(readers)}: it must be left dense.")
        for module in _packed(model).values():
            # transformers has models initialise weights that they do not look at first; those that
            # are flagged it leaves alone.
            weight = torch.empty(module.weight_shape, device="meta")
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            module.__dict__["weight"] = weight
        return model

    def _put_in_place(self, model: Any) -> None:
        """Replaces the linears that the configuration names by empty packed modules."""
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for group in self.quantization_config.groups:
            embedding = self._put_embedding(model, group) if "embedding" in group else None
            for stored_name in group["modules"]:
                if _is_of_another_head(model, stored_name):
                    continue
                name = _local_name(model, stored_name)
                linear = model.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise ValueError(
                        f"{stored_name} of quantization_config is a {type(linear).__name__} in "
                        "this model, not an nn.Linear: config.json does not fit it."
                    )
                if embedding is None and f"{name}.weight" in {*tied, *tied.values()}:
                    raise ValueError(
                        f"{stored_name} of quantization_config shares its weight with another "
                        "module of this model: config.json does not fit it."
                    )
                try:
                    module = self.quantization_config.build(group, linear)
                except ValueError as error:
                    raise ValueError(f"{stored_name} of quantization_config: {error}") from None
                model.set_submodule(name, module)
                if embedding is not None:
                    _tie(model, embedding, name)

    def _put_embedding(self, model: Any, group: Mapping[str, Any]) -> str:
        """Replaces the embedding of a head's group by an empty packed one; its name."""
        name = _local_name(model, group["embedding"])
        dense = model.get_submodule(name)
        form: dict[str, Any] = {"d": group["d"], "code_bits": group["code_bits"]}
        try:
            weight = dense.get_parameter("weight")
            packed = VQEmbedding(dense, **form, dtype=weight.dtype, device=weight.device)
        except (AttributeError, TypeError):
            raise ValueError(
                f"{group['embedding']} of quantization_config is a {type(dense).__name__} in "
                "this model, not an nn.Embedding: config.json does not fit it."
            ) from None
        model.set_submodule(name, packed)
        return name

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        _check_all_loaded(model)
        for parameter in model.parameters():
            # What is mapped from a file lies where its header has put it; kernels read numbers.
            if not parameter.is_meta and parameter.data_ptr() % parameter.element_size():
                parameter.data = parameter.data.clone()
        tie_codebooks(model)
        packed = _packed(model)
        for name, module in packed.items():
            module.__dict__.pop("weight", None)
            if isinstance(module, VQEmbedding):
                module.restore_scale()
            for parameter in module.packed_parameters().values():
                parameter.requires_grad_(False)  # transformers wants one of all that is float
            try:
                module.validate()
            except ValueError as error:
                raise ValueError(f"{name} in the checkpoint is damaged: {error}") from None
        checked = {id(p) for module in packed.values() for p in module.packed_parameters().values()}
        rest = {name: p for name, p in model.named_parameters() if id(p) not in checked}
        check_finite(rest, "in the checkpoint is damaged: it")
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

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        return replace_by_dense(model, dtype)


_FORMAT_TENSORS = {
    "codes", "codebook", "row_norms", "col_norms", "bitmap", "values", "row_offsets",
}  # fmt: skip


def attach(model: Any, config: NowagConfig) -> None:
    """Marks a model whose modules have been replaced, as ``from_pretrained`` would."""
    model.hf_quantizer = NowagHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config


def replace_by_dense(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Replaces every packed module by an ``nn.Linear`` with the same weight.

    The whole model is then of ``dtype``, by default that of its other weights, and in memory, what
    was offloaded too. A string is what transformers leaves for a dtype in the configuration of a
    model that was saved.
    """
    bring_back(model)
    if isinstance(dtype, str):
        dtype = DTYPES[dtype]
    whole, dtype = dtype is not None, dtype or model.dtype
    made: dict[int, nn.Parameter] = {}  # by a packed tensor: what was one weight stays one
    packed = _packed(model)
    for name, module in packed.items():
        tensor = next(iter(module.packed_parameters().values()))
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(module.weight_form().dequantize(dtype))
        model.set_submodule(name, take_hooks(module.to_dense(made[id(tensor)]), module))
    disown_codebooks(model)
    if len(made) < len(packed):
        untie_head(model)
    return nn.Module.to(model, dtype) if whole else model


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


def _is_of_another_head(model: Any, name: str) -> bool:
    """Whether a module is of the head of the model that was saved, and this has none or another."""
    prefix = getattr(model, "base_model_prefix", "")
    inside = not prefix or name.startswith(f"{prefix}.")
    return not inside and model.get_output_embeddings() is None


def _tie(model: Any, embedding: str, head: str) -> None:
    """Ties an empty head and embedding; raises ValueError if one does not fit the other."""
    shapes = (model.get_submodule(head).weight_shape, model.get_submodule(embedding).weight_shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{head} and {embedding} of quantization_config are one weight, but in this model they "
            f"are {shapes[0]} and {shapes[1]}: config.json does not fit it."
        )
    tie_head(model, embedding, head)


def _packed(model: nn.Module) -> dict[str, PackedModule]:
    return {n: module for n, module in model.named_modules() if isinstance(module, PackedModule)}


def _check_headers(model: Any, files: Iterable[str]) -> None:
    """Raises ValueError, before anything is loaded, for a broken file or a tensor unfit for it.

    transformers would convert a packed tensor of another dtype, or start afresh where a shape
    differs, in silence if told to; it keeps integers in the place of floating-point numbers. What
    is not of the base model, a head, may have other shapes. Tensors that transformers renames while
    loading are left to its checks.
    """
    expected = dict(model.state_dict())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    has_head = any(name.startswith(prefix) for name in expected)
    packed = {f"{name}." for name in _packed(model)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for stored_name in opened.keys():  # noqa: SIM118
                    names = (stored_name, stored_name.removeprefix(prefix), prefix + stored_name)
                    name = next((name for name in names if name in expected), None)
                    if name is None:
                        continue
                    if name in tied and name.rpartition(".")[2] in _FORMAT_TENSORS:
                        raise ValueError(
                            f"{stored_name} in {file} is stored beside {tied[name]}, which it is "
                            "tied to: they are one tensor."
                        )
                    module = f"{name.rpartition('.')[0]}."
                    of_form = OWNER in name.split(".") or (
                        module in packed and name.rpartition(".")[2] in _FORMAT_TENSORS
                    )
                    fixed = of_form or module in packed or not has_head or name.startswith(prefix)
                    stored = opened.get_slice(stored_name)
                    if fixed:
                        _check_shape(stored, expected[name], f"{stored_name} in {file}")
                    _check_dtype(stored, expected[name], of_form, f"{stored_name} in {file}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged: {error}.") from None


def _check_shape(stored: Any, expected: torch.Tensor, what: str) -> None:
    shape = tuple(stored.get_shape())
    if shape != tuple(expected.shape):
        raise ValueError(
            f"{what} has shape {shape}, but the configuration asks for {tuple(expected.shape)}."
        )


def _check_dtype(stored: Any, expected: torch.Tensor, exact: bool, what: str) -> None:
    """Raises ValueError unless a tensor has the dtype, or if not ``exact`` the kind of dtype."""
    dtype = stored.get_dtype()
    if exact and dtype != _STORED_DTYPES[expected.dtype]:
        raise ValueError(
            f"{what} is {dtype}, but the format asks for {_STORED_DTYPES[expected.dtype]}."
        )
    if dtype.startswith(("F", "BF")) != expected.is_floating_point():
        kind = "a floating-point dtype" if expected.is_floating_point() else "integers"
        raise ValueError(f"{what} is {dtype}, but {kind} must be there.")


def _check_all_loaded(model: Any) -> None:
    """Raises ValueError if a packed module's tensor was not in the checkpoint.

    transformers only warns, and fills what it knows: to others it is a head that is new.
    """
    owners = [module for module in model.modules() if isinstance(module, Codebooks)]
    wanted = {id(tensor) for module in owners for tensor in module.parameters()}
    for module in _packed(model).values():
        wanted |= {id(tensor) for tensor in module.parameters(recurse=False)}
    missing = [
        name
        for name, tensor in model.named_parameters()
        if id(tensor) in wanted and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the checkpoint is incomplete: it has no tensor {missing[0]}{more}.")
