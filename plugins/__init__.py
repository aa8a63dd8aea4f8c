"""Decoding-time guidance by value models (MAVIS), one module per host engine.

Nothing heavy is imported here: names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import ValueEngine
    from .heads import MAVISValueHeads
    from .params import GuidanceParams
    from .search.beam import beam_search
    from .search.best_of_n import best_of_n
    from .search.interface import SearchOutput
    from .value_config import MAVISValueConfig
    from .value_model import MAVISValueModel

_MODULES = {
    "GuidanceParams": "params",
    "MAVISValueConfig": "value_config",
    "MAVISValueHeads": "heads",
    "MAVISValueModel": "value_model",
    "SearchOutput": "search.interface",
    "ValueEngine": "engine",
    "beam_search": "search.beam",
    "best_of_n": "search.best_of_n",
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
