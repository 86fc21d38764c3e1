"""Weights that stay on disk until they are needed: modules offloaded by accelerate.

``from_pretrained`` with "disk" in its device_map leaves a module's parameters on the meta device,
and hooks that read them from the checkpoint's own files for the time of a forward.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from nowag_ext.decoder import decoder_layers


def layers_on_disk(model: nn.Module, device: str = "cpu") -> dict[str, str]:
    """The device_map for a model like this one (on the meta device, say) to be read layer by layer.

    All of it is on a device but the decoder layers, which run there; those are there too where a
    module around them has parameters of its own, which no such map can name apart from the layers,
    and where a layer shares a parameter, which accelerate does not find again.
    """
    lists = {name.rpartition(".")[0] for name in decoder_layers(model)}
    places: dict[str, str] = {}
    apart = True

    def place(prefix: str, module: nn.Module) -> None:
        nonlocal apart
        apart = apart and not module._parameters
        for child, part in module.named_children():
            name = f"{prefix}{child}"
            if any(one.startswith(f"{name}.") for one in lists):
                place(f"{name}.", part)
            else:
                places[name] = "disk" if name in lists else device

    place("", model)
    return places if apart and not _shares(model, lists) else {"": device}


def _shares(model: nn.Module, lists: set[str]) -> bool:
    """Whether a parameter within these lists of layers goes by another name, too."""
    every = dict(model.named_parameters(remove_duplicate=False))
    times = Counter(map(id, every.values()))
    within = tuple(f"{name}." for name in lists)
    return any(times[id(p)] > 1 for name, p in every.items() if name.startswith(within))


@contextmanager
def own_parameters(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """A module's own parameters by name, read from disk if they are there, while this is open."""
    with align_module_device(module):
        own = module._parameters.items()
        yield {name: parameter for name, parameter in own if parameter is not None}


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


def bring_back(model: Any) -> None:
    """Everything that accelerate has offloaded, to the CPU or to disk, in memory and to stay."""
    offloaded = [module for module in model.modules() if has_offloaded_params(module)]
    for module in offloaded:
        with own_parameters(module) as own:
            found = dict(own)
        _remove_hook(module)  # puts back what was in memory before
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = found[name]
    if offloaded:
        model.tie_weights()  # each module has brought its own


def twin(model: Any) -> Any:
    """The model once more: other modules, free to be replaced, of the very same tensors."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        memo[id(tensor)] = tensor
    for module in model.modules():
        loader = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if loader is not None:  # reads from disk, or holds tensors
            memo[id(loader)] = loader
    return copy.deepcopy(model, memo)


def share_tensors(model: nn.Module, other: nn.Module) -> None:
    """Parameters of a model that equal another's of the same name become the very same."""
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, own in module._parameters.items():
            same = theirs.get(f"{prefix}.{name}" if prefix else name)
            if own is not None and same is not None and equal_bits(own, same):
                module._parameters[name] = same


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same place are of one dtype and equal, of which NaN is not."""
    return (
        not (one.is_meta or other.is_meta)
        and (one.dtype, one.device) == (other.dtype, other.device)
        and torch.equal(one, other)
    )


# What nn.Module keeps of hooks; those of saving and loading belong to the weights.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def take_hooks(module: nn.Module, replaced: nn.Module) -> nn.Module:
    """The module, with the hooks of the one that it replaces: the user's, and accelerate's.

    The user's are the very ones: their handles go on to remove them. Accelerate's moves the
    module's inputs; what was offloaded is not any more: the module is in memory, on its device.
    """
    for name in _HOOKS:
        setattr(module, name, getattr(replaced, name))
    hook = getattr(replaced, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook) and not hook.offload:
        # Another one: it holds on to parameters.
        add_hook_to_module(
            module,
            AlignDevicesHook(
                hook.execution_device,
                io_same_device=hook.io_same_device,
                skip_keys=hook.skip_keys,
                place_submodules=hook.place_submodules,
            ),
        )
    return module


def copied(module: nn.Module) -> nn.Module:
    """A copy in memory, which has nothing to do with any disk."""
    with in_memory(module):
        twin = copy.deepcopy(module)
    for part in twin.modules():
        _remove_hook(part)
    return twin


def _remove_hook(module: nn.Module) -> None:
    """Removes accelerate's hook, and the forward that it leaves behind as the module's own."""
    if hasattr(module, "_hf_hook"):
        remove_hook_from_module(module)
        if getattr(module.forward, "__func__", None) is type(module).forward:
            vars(module).pop("forward", None)
