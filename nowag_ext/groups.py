"""The groups of a checkpoint's configuration: which linears have which packed form.

The text of ``integrations/transformers.py`` says what a group holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nowag_ext.methods import METHODS
from nowag_ext.stored import shown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EVERY = ("method", "weight_dtype", "modules")  # settings may be missing
_SCALAR = (str, int, float, bool, type(None))
_LARGEST = 1 << 62


def format_group(
    method: str,
    form: Mapping[str, Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    modules: Sequence[str],
) -> dict[str, Any]:
    """One entry of a configuration's ``groups``."""
    name = str(dtype).removeprefix("torch.")
    return {
        "method": method,
        **form,
        "weight_dtype": name,
        "settings": dict(settings),
        "modules": list(modules),
    }


def checked_groups(
    groups: Any, version: int, method: Any = None, settings: Any = None
) -> list[dict[str, Any]]:
    """The groups in the form of the present version.

    Args:
        groups: what a configuration holds, of whatever type.
        version: its format_version, 1 or 2.
        method, settings: those of version 1, where they stood beside the groups.

    Raises:
        ValueError: anything that no release writes; the sentence names the field.
    """
    if not isinstance(groups, list | tuple):
        raise ValueError(
            f"quantization_config.groups of config.json must be a list, not {shown(groups)}."
        )
    checked: list[dict[str, Any]] = []
    where_of: dict[str, str] = {}
    for index, group in enumerate(groups):
        where = f"quantization_config.groups[{index}] of config.json"
        if not isinstance(group, dict):
            raise ValueError(
                f"a group of quantization_config must be an object, but {where} is {shown(group)}."
            )
        if version == 1:
            group = {**group, "method": method, "settings": {} if settings is None else settings}
        _check_group(group, where)
        for name in group["modules"]:
            if name in where_of:
                raise ValueError(f"{where} names {name}, as does {where_of[name]}.")
            where_of[name] = where
        checked.append(group)
    return checked


def _check_group(group: Mapping[str, Any], where: str) -> None:
    method = group.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method in {where} must be {' or '.join(METHODS)}, not {shown(method)}.")
    fields = set(group) - {*_EVERY, "settings"}
    if not set(group) >= set(_EVERY) or fields not in METHODS[method].forms:
        forms = " or ".join(", ".join(sorted(form)) for form in METHODS[method].forms)
        raise ValueError(
            f"{where} is malformed: it must have {', '.join(_EVERY)}, and of {method} {forms}, "
            f"but has {shown(sorted(group))}."
        )
    for name in fields:
        value = group[name]
        if not isinstance(value, _SCALAR) or (isinstance(value, int) and abs(value) > _LARGEST):
            raise ValueError(f"{name} in {where} cannot be {shown(value)}.")
    if not isinstance(group["weight_dtype"], str) or group["weight_dtype"] not in DTYPES:
        raise ValueError(
            f"weight_dtype in {where} must be one of {', '.join(DTYPES)}, "
            f"not {shown(group['weight_dtype'])}."
        )
    modules = group["modules"]
    if not isinstance(modules, list):
        raise ValueError(f"modules in {where} must be a list of names, not {shown(modules)}.")
    for name in modules:
        if not isinstance(name, str):
            raise ValueError(f"modules in {where} must be names, but one is {shown(name)}.")
    settings = group.get("settings", {})
    if not isinstance(settings, dict) or not all(
        isinstance(value, _SCALAR) for value in settings.values()
    ):
        raise ValueError(
            f"settings in {where} must be names with a number or a string each, "
            f"not {shown(settings)}."
        )
    try:
        METHODS[method].check_form(group)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
