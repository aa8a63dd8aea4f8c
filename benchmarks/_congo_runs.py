"""What the CONGO benchmarks share: command line, runs with a budget a round, figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import typing as tp
import warnings
from pathlib import Path

import nevergrad as ng
import numpy as np

import trimtab.optimizers  # noqa: F401  (fills Nevergrad's registry)

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"


def arguments(description: str, seeds: int) -> argparse.Namespace:
    """The options of every benchmark: ``--quick`` and ``--seeds``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke test: writes no file")
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.seeds = min(options.seeds, 2)
    warnings.filterwarnings("ignore")
    return options


def summary(values: tp.Sequence[float]) -> dict[str, float]:
    """Mean, standard error and number of values."""
    x = np.asarray(values, dtype=float)
    error = float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
    return {"mean": float(x.mean()), "standard_error": error, "n": len(x)}


def save(name: str, content: dict[str, tp.Any]) -> None:
    """Writes ``results/<name>.json`` with the versions that produced it, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "versions": {"nevergrad": ng.__version__, "numpy": np.__version__},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        **content,
    }
    unfinished = RESULTS / f"{name}.json.unfinished"
    # A list of figures stays on its line.
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), json.dumps(content, indent=1))
    unfinished.write_text(text + "\n")
    os.replace(unfinished, RESULTS / f"{name}.json")
