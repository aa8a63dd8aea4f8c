"""A real PostgreSQL (Debian's package `postgresql`), tuned through psql under pgbench."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pydantic")
from trimtab.optimizers.tune.commands import Failed
from trimtab.optimizers.tune.config import load
from trimtab.optimizers.tune.loop import Tuner

pytestmark = pytest.mark.skipif(
    shutil.which("pgbench") is None or not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    reason="PostgreSQL is not installed: apt-get install --no-install-recommends postgresql",
)
PSQL = ["psql", "-qAtX", "-c"]
LATENCY = "pgbench -n -c 2 -t 20 | sed -n 's/^latency average = \\(.*\\) ms/\\1/p'"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    with importlib.import_module("tune_postgres").Server() as running:
        for name, value in running.environment.items():
            if name.startswith("PG"):
                monkeypatch.setenv(name, value)
        running.fill(1)
        yield running


def test_settings_are_what_the_log_says(server, tmp_path):
    apply = [*PSQL, "ALTER SYSTEM SET {name} = '{value}'"]
    start = {
        "commit_delay": 15000,
        "work_mem": 4096,
        "enable_indexscan": False,
        "random_page_cost": 4,
    }
    knobs = [
        {"name": "commit_delay", "type": "int", "low": 0, "high": 20000},
        {"name": "work_mem", "type": "int", "low": 64, "high": 262144, "scale": "log"},
        {"name": "enable_indexscan", "type": "bool"},
        {"name": "random_page_cost", "type": "float", "low": 0.1, "high": 100, "scale": "log"},
    ]
    content = {
        "knobs": [{**k, "start": start[k["name"]], "command": apply} for k in knobs],
        "after": {"command": [*PSQL, "SELECT pg_reload_conf()"]},
        "cost": {"command": ["sh", "-c", LATENCY]},
        "settle": 0.1,
        "window": 0,
        "evaluations": 24,
        # As of the last reload: what the server runs with is below the bound, or rolled back.
        "limits": {"slo": {"command": [*PSQL, "SELECT setting FROM pg_settings WHERE name = "
                                       "'random_page_cost'"], "bound": 50}},
    }  # fmt: skip
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
    server.execute("ALTER SYSTEM SET commit_siblings = 0", "SELECT pg_reload_conf()")
    tuner = Tuner(load(tmp_path / "tune.yaml"))
    assert tuner.run()
    lines = [json.loads(x) for x in (tmp_path / "tune.state.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "tell"]
    assert len(told) == 24 and all(t["outcome"] == "ok" and t["cost"] > 0 for t in told)
    # A connection made now runs with the last good point, as PostgreSQL itself writes it.
    shown = server.execute(
        *(f"SELECT setting FROM pg_settings WHERE name = '{name}'" for name in start)
    ).split()
    good = told[-1]["good"]
    assert [int(shown[0]), int(shown[1]), shown[2] == "on"] == [
        good["commit_delay"], good["work_mem"], good["enable_indexscan"],
    ]  # fmt: skip
    assert float(shown[3]) == pytest.approx(good["random_page_cost"], rel=1e-5)
    audit = [json.loads(x) for x in (tmp_path / "tune.audit.jsonl").read_text().splitlines()]
    assert {c["knob"] for c in audit} == set(start)


def test_setting_that_postgresql_refuses_is_told_before_anything_is_measured(server, tmp_path):
    """The start is applied first, and PostgreSQL's own words are shown."""
    knob = {
        "name": "commit_dilay", "type": "int", "low": 0, "high": 9, "start": 1,
        "command": ["psql", "-qAtX", "-c", "ALTER SYSTEM SET {name} = '{value}'"],
    }  # fmt: skip
    content = {"knobs": [knob], "cost": {"command": ["echo", "1"]}, "settle": 0, "window": 0}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(Failed, match='unrecognized configuration parameter "commit_dilay"'):
        Tuner(load(tmp_path / "tune.yaml")).run()
