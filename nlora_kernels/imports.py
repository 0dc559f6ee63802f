"""Running code once another package has been imported, without importing it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}


def when_imported(name: str):
    """Decorates a function of the module `name`: called now if that is imported already, else as soon as it is."""

    def decorate(function: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        if _initialising(name):
            # By another thread, for which this waits.
            importlib.import_module(name)
        module = sys.modules.get(name)
        if module is not None and not _initialising(name):
            function(module)
        else:
            _waiting.setdefault(name, []).append(function)
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
        return function

    return decorate


def _initialising(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


class _Finder:
    """Finds nothing itself: it has the others find a module that is waited for, and its loader tell when it is done."""

    def find_spec(self, name, path=None, target=None):
        if name not in _waiting or name in self.searched:
            return None
        self.searched.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searched.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec

    def __init__(self):
        self.searched: set[str] = set()


class _Loader:
    """A loader that runs what waits for the module when it has been executed."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader
        for function in _waiting.pop(module.__name__, ()):
            function(module)


_FINDER = _Finder()
