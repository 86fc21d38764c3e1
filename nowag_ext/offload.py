"""Weights that stay on disk until they are needed: modules offloaded by accelerate.

``from_pretrained`` with "disk" in its device_map leaves a module's parameters on the meta device,
and hooks that read them from the checkpoint's own files for the time of a forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from nowag_ext.decoder import decoder_layers


def layers_on_disk(model: nn.Module) -> dict[str, str]:
    """The device_map for a model like this one (on the meta device, say) to be read layer by layer.

    All of it is in memory but the decoder layers.
    """
    lists = {name.rpartition(".")[0] for name in decoder_layers(model)}
    places: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        if name in lists:
            places[name] = "disk"
        elif any(one.startswith(f"{name}.") for one in lists):
            assert not module._parameters, f"{name} has parameters beside its submodules"
            for child, part in module.named_children():
                place(f"{name}.{child}", part)
        else:
            places[name] = "cpu"

    for child, part in model.named_children():
        place(child, part)
    return places


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """All parameters of a module in memory, where it runs, for as long as this is open."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def weight_of(linear: nn.Linear) -> Tensor:
    """A linear's weight, read from disk if it is there."""
    with align_module_device(linear):
        return linear.weight.detach()


def bias_of(linear: nn.Linear) -> nn.Parameter | None:
    """A linear's bias, read from disk if it is there."""
    with align_module_device(linear):
        return linear.bias


def device_of(module: nn.Module) -> torch.device:
    """Where a module with parameters of its own runs."""
    if has_offloaded_params(module):
        return torch.device(module._hf_hook.execution_device)  # type: ignore[arg-type, union-attr]
    return next(module.parameters(recurse=False)).device


def copied(module: nn.Module) -> nn.Module:
    """A copy in memory, which has nothing to do with any disk."""
    with in_memory(module):
        twin = copy.deepcopy(module)
    for part in twin.modules():
        _remove_hook(part)
    return twin


def bring_in(model: nn.Module) -> None:
    """Reads, in place, all that is still on disk: the model is an ordinary one from then on."""
    for part in model.modules():
        with align_module_device(part):
            parameters = dict(part._parameters)
        _remove_hook(part)
        part._parameters.update(parameters)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map


def _remove_hook(module: nn.Module) -> None:
    """Removes accelerate's hook, and the forward that it leaves behind as the module's own."""
    if hasattr(module, "_hf_hook"):
        remove_hook_from_module(module)
        if getattr(module.forward, "__func__", None) is type(module).forward:
            vars(module).pop("forward", None)
