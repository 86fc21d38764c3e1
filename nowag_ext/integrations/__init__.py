"""What ties the package to others. None of them is imported before it is used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"  # where transformers keeps its quantizers


def register_with_transformers() -> None:
    """Registers the quantizer now if transformers' registry is loaded, else as soon as it is.

    transformers has no entry points for quantizers, and takes seconds to import.
    """
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    import nowag_ext.integrations.transformers  # noqa: F401


class _RegistryFinder(MetaPathFinder):
    """Finds the registry as Python does, with a loader that registers the quantizer afterwards."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
