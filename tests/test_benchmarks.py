"""Every benchmark and example that needs no model still runs, on a problem cut small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks/congo_quadratics.py", "--quick"],
        ["benchmarks/congo_queueing.py", "--quick"],
        ["benchmarks/congo_scaling.py", "--quick"],
        ["examples/tune_a_live_service.py", "--rounds", "2"],
        ["examples/congo_on_dask.py"],
    ],
    ids=lambda command: Path(command[0]).stem,
)
def test_it_runs(command, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.strip()
    assert not list(tmp_path.iterdir())  # a smoke test leaves nothing behind
