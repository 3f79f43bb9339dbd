"""Registration with transformers' auto classes, at the moment they are first imported and not before.

`import moesaic` must load neither torch nor transformers, and `AutoModelForCausalLM.from_pretrained(folder)` must know our
architectures after it. So a finder waits for the two modules in which transformers keeps its tables, and fills them in as
soon as they have run; what is loaded already is filled in at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
LANGUAGE = "moesaic.models.language"
HOSTED = "moesaic.models.hosted"
RESHAPED = "moesaic.models.reshaped"
UPCYCLED = "moesaic.models.upcycled"


def _register_config() -> None:
    config = importlib.import_module(f"{LANGUAGE}.config").MoesaicConfig
    retrofitted = importlib.import_module(f"{HOSTED}.classes").RetrofittedConfig
    reshaped = importlib.import_module(f"{RESHAPED}.classes").ReshapedConfig
    upcycled = importlib.import_module(f"{UPCYCLED}.classes").UpcycledConfig
    for known in (config, retrofitted, reshaped, upcycled):
        sys.modules[CONFIGS].AutoConfig.register(known.model_type, known, exist_ok=True)


def _register_model() -> None:
    _register_config()
    config = importlib.import_module(f"{LANGUAGE}.config").MoesaicConfig
    model = importlib.import_module(f"{LANGUAGE}.model")
    sys.modules[MODELS].AutoModel.register(config, model.MoesaicModel, exist_ok=True)
    sys.modules[MODELS].AutoModelForCausalLM.register(config, model.MoesaicForCausalLM, exist_ok=True)


_WAITING = {CONFIGS: _register_config, MODELS: _register_model}


class _AfterImport(Loader):
    """A module's own loader, with a call after the module has run."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _WAITING[self._name]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """Finds nothing of its own: lets the others find, and wraps the loader of the two modules."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _WAITING:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _AfterImport(spec.loader, name)
                return spec
        return None


def install() -> None:
    """Register now what transformers has loaded, and the rest when it loads it. A second call changes nothing."""
    for name, register in _WAITING.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
