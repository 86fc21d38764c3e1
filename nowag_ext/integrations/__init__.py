"""What ties the package to others. None of them is imported before it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    """Finds the registry as others do, with a loader that registers the quantizer afterwards."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    """Another loader, which once it has run registers the quantizer and retires its finder."""

    def __init__(self, loader: Loader, finder: _RegistryFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()
