"""Decoding-time guidance by value models (MAVIS), one module per host engine.

Nothing heavy is imported here: names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import ValueEngine
    from .heads import MAVISValueHeads
    from .params import GuidanceParams
    from .search import SearchOutput, beam_search, best_of_n
    from .value_config import MAVISValueConfig
    from .value_model import MAVISValueModel

_MODULES = {
    "GuidanceParams": "params",
    "MAVISValueConfig": "value_config",
    "MAVISValueHeads": "heads",
    "MAVISValueModel": "value_model",
    "SearchOutput": "search",
    "ValueEngine": "engine",
    "beam_search": "search",
    "best_of_n": "search",
}

__all__ = [
    "GuidanceParams",
    "MAVISValueConfig",
    "MAVISValueHeads",
    "MAVISValueModel",
    "SearchOutput",
    "ValueEngine",
    "beam_search",
    "best_of_n",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("torch", "transformers"):
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}; pip install 'trimtab[transformers]'",
            name=error.name,
        ) from error
    return getattr(module, name)
