"""Against a real Prometheus (Debian's package `prometheus`) that scrapes a live service."""

import contextlib
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pydantic")
pytest.importorskip("prometheus_client")
from prometheus_client import parser

from trimtab.optimizers.tune.commands import Failed
from trimtab.optimizers.tune.config import ConfigError, load
from trimtab.optimizers.tune.loop import Status, Tuner
from trimtab.optimizers.tune.metrics import Exporter, View

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed: apt-get install --no-install-recommends prometheus",
)
SERVICE = str(Path(__file__).with_name("live_service.py"))
# Requests to the first take 36 ms longer than they need; the second is at its best.
START = {"size0": 2, "size1": 16}
# A scrape of a busy machine may be late.
DOWN = "max(1 - max_over_time(up{job='service'}[10s]))"
COST = "1000 * sum(rate(work_seconds_sum[{window}])) / sum(rate(work_seconds_count[{window}]))"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetched(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def until(true, seconds=300):
    """Polls until something is true; a busy machine only takes longer."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := true():
                return found
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@contextlib.contextmanager
def process(*argv, **kwargs):
    started = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **kwargs)
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


class Live:
    """Two backends under load, Prometheus, and a port for the tuner's own metrics."""

    def __init__(self, stack, folder):
        self.folder = folder
        backends = [
            stack.enter_context(process(sys.executable, SERVICE, "backend", str(start)))
            for start in START.values()
        ]
        self.ports = [int(each.stdout.readline()) for each in backends]
        stack.enter_context(process(sys.executable, SERVICE, "load", *map(str, self.ports)))
        self.metrics, port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        scraped = {
            "service": [f"127.0.0.1:{p}" for p in self.ports],
            "tuner": [f"127.0.0.1:{self.metrics}"],
        }
        (folder / "prometheus.yaml").write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
                    "scrape_configs": [
                        {"job_name": job, "static_configs": [{"targets": targets}]}
                        for job, targets in scraped.items()
                    ],
                }
            )
        )
        stack.enter_context(
            process(
                "prometheus",
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                stderr=(folder / "prometheus.log").open("w"),
            )
        )
        until(lambda: self.query("count(work_seconds_count > 0)") == ["2"])

    def query(self, promql):
        where = f"{self.url}/api/v1/query?" + urllib.parse.urlencode({"query": promql})
        return [series["value"][1] for series in json.loads(fetched(where))["data"]["result"]]

    def sizes(self):
        return {
            f"size{i}": json.loads(fetched(f"http://127.0.0.1:{port}/state"))["size"]
            for i, port in enumerate(self.ports)
        }

    def configured(self, **changes):
        knobs = [
            {
                "name": f"size{i}", "type": "float", "low": 1, "high": 64, "scale": "log",
                "start": START[f"size{i}"],
                "http": {
                    "method": "PUT",
                    "url": f"http://127.0.0.1:{port}/size",
                    "body": {"size": "{value}"},
                },
            }
            for i, port in enumerate(self.ports)
        ]  # fmt: skip
        content = {
            "knobs": knobs,
            "prometheus": {"url": self.url},
            "cost": {"promql": COST},
            "settle": 0.5,
            "window": 3,
            "optimizer": {"delta": 0.5},
            "evaluations": 15,
            "limits": {"slo": {"promql": DOWN, "bound": 0.5, "every": 1}},
            "metrics": {"port": self.metrics},
            **changes,
        }
        path = self.folder / "tune.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


@pytest.fixture
def live(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Live(stack, tmp_path)


@needs_prometheus
def test_live_service_is_tuned_through_a_kill(live):
    path = live.configured()
    until(lambda: live.query(COST.replace("{window}", "3s")))
    argv = [sys.executable, "-m", "trimtab.optimizers.tune", str(path)]
    state = live.folder / "tune.state.jsonl"
    tuner = subprocess.Popen(argv)
    until(lambda: state.exists() and state.read_bytes().count(b'"tell"') >= 6)
    own = {
        (s.name, *s.labels.values()): s.value
        for family in parser.text_string_to_metric_families(
            fetched(f"http://127.0.0.1:{live.metrics}/metrics")
        )
        for s in family.samples
    }
    tuner.send_signal(signal.SIGKILL)
    tuner.wait()
    assert own["trimtab_tune_evaluations_total", "ok"] >= 6
    assert own["trimtab_tune_knob", "size0", "good"] >= 1 and own["trimtab_tune_cost",] > 1.9
    # Prometheus scraped the tuner too.
    ok = "max(max_over_time(trimtab_tune_evaluations_total{outcome='ok'}[1h]))"
    until(lambda: float(live.query(ok)[0]) >= 5)
    assert subprocess.run(argv).returncode == 0
    told = [x for x in map(json.loads, state.read_text().splitlines()) if x["kind"] == "tell"]
    assert [t["number"] for t in told] == list(range(1, 16))
    costs = [t["cost"] for t in told if t["outcome"] == "ok"]
    assert len(costs) >= 10 and min(costs) > 1.9  # 2 at the best sizes
    # The services have what the log says, and it is better than the start.
    assert live.sizes() == told[-1]["good"]
    assert sum(math.log2(size / 16) ** 2 for size in live.sizes().values()) < 9


@needs_prometheus
@pytest.mark.parametrize(
    "promql, expected",
    [
        ("sum(rate(work", "cost: promql 'sum\\(rate\\(work': .*parse error"),
        ("no_such_metric", "cost: promql 'no_such_metric' gives nothing: is it scraped"),
        ("size", "cost: promql 'size' gives 2 series: aggregate"),
        ("size[1m]", "cost: promql 'size\\[1m\\]' gives a matrix"),
        ("sum(size) / 0", "cost: promql 'sum\\(size\\) / 0': '\\+Inf' is not a finite number"),
    ],
)
def test_wrong_query_is_refused_before_anything_is_changed(live_once, promql, expected):
    path = live_once.configured(cost={"promql": promql})
    with pytest.raises(Failed, match=expected):
        Tuner(load(path)).run()
    assert live_once.sizes() == START


@pytest.fixture(scope="module")
def live_once(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        yield Live(stack, tmp_path_factory.mktemp("live"))


@needs_prometheus
def test_address_that_is_no_prometheus_is_told(live_once):
    url = f"http://127.0.0.1:{live_once.ports[0]}"
    with pytest.raises(Failed, match="is it the address of a Prometheus server"):
        Tuner(load(live_once.configured(prometheus={"url": url}))).run()


def a_config(tmp_path, **changes):
    knobs = [
        {"name": "n", "type": "int", "low": 1, "high": 9, "start": 2, "command": ["x", "{value}"]},
        {
            "name": "m",
            "type": "choice",
            "choices": ["a", "b"],
            "start": "b",
            "command": ["{value}"],
        },
    ]
    content = {"knobs": knobs, "cost": {"command": ["x"]}, "settle": 0, "window": 0, **changes}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
    return load(tmp_path / "tune.yaml")


def a_status():
    status = Status(phase="measuring", evaluations=3, cost=2.5, recommended=None, rounds=1)
    status.outcomes = {"ok": 2, "failed": 0, "breach": 1}
    status.now, status.good = {"n": 4}, {"n": 3, "m": "b"}
    return status


def test_own_metrics(tmp_path):
    config = a_config(tmp_path, metrics={"port": free_port()})
    exporter = Exporter(config)
    try:
        exporter(a_status())
        text = fetched(f"http://127.0.0.1:{config.metrics.port}/metrics")
        with pytest.raises(ConfigError, match="cannot listen there: Address already in use"):
            Exporter(config)
    finally:
        exporter.close()
    samples = {
        (s.name, *s.labels.values()): s.value
        for family in parser.text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples == {
        ("trimtab_tune_cost",): 2.5,
        ("trimtab_tune_outage",): 0,
        ("trimtab_tune_rounds_total",): 1,
        ("trimtab_tune_rollbacks_total",): 0,
        ("trimtab_tune_evaluations_total", "ok"): 2,
        ("trimtab_tune_evaluations_total", "failed"): 0,
        ("trimtab_tune_evaluations_total", "breach"): 1,
        ("trimtab_tune_knob", "n", "now"): 4,
        ("trimtab_tune_knob", "n", "good"): 3,
        ("trimtab_tune_knob", "m", "good"): 1,
    }


def test_view_shows_knobs_and_costs(tmp_path, capsys):
    pytest.importorskip("rich")
    view = View(a_config(tmp_path))
    view(a_status())
    view.close()
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("measuring", "2 ok", "1 breach", "cost 2.5", "recommended none", "1 … 9", "?"):
        assert text in shown
