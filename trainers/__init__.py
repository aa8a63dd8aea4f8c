"""Training of MAVIS value models, in the manner of TRL's trainers.

Nothing heavy is imported here: names are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import write_rollouts
    from .evaluation.fronts import distinct_n, evaluate, hypervolume
    from .evaluation.judge import PairwiseJudge, judge_points
    from .evaluation.points import Point, Policy, Response
    from .evaluation.report import write_report
    from .evaluation.sweep import simplex_weights, sweep
    from .mavis_config import MAVISConfig
    from .mavis_trainer import MAVISTrainer
    from .rollouts import read_rollouts
    from .trees import Tree

_MODULES = {
    "MAVISConfig": "mavis_config",
    "MAVISTrainer": "mavis_trainer",
    "PairwiseJudge": "evaluation.judge",
    "Point": "evaluation.points",
    "Policy": "evaluation.points",
    "Response": "evaluation.points",
    "Tree": "trees",
    "distinct_n": "evaluation.fronts",
    "evaluate": "evaluation.fronts",
    "hypervolume": "evaluation.fronts",
    "judge_points": "evaluation.judge",
    "read_rollouts": "rollouts",
    "simplex_weights": "evaluation.sweep",
    "sweep": "evaluation.sweep",
    "write_report": "evaluation.report",
    "write_rollouts": "data",
}
_EXTRAS = {
    "accelerate",
    "datasets",
    "moocore",
    "peft",
    "pyarrow",
    "torch",
    "tqdm",
    "transformers",
    "trl",
}

__all__ = [
    "MAVISConfig",
    "MAVISTrainer",
    "PairwiseJudge",
    "Point",
    "Policy",
    "Response",
    "Tree",
    "distinct_n",
    "evaluate",
    "hypervolume",
    "judge_points",
    "read_rollouts",
    "simplex_weights",
    "sweep",
    "write_report",
    "write_rollouts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}; pip install 'trimtab[trl]'", name=error.name
        ) from error
    return getattr(module, name)
