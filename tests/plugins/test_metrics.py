"""What Prometheus is told: of requests exactly what was sent, of steps what they did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import EOS, VOCAB_SIZE, wait_until_up
from tests.plugins.test_vllm import sampling, v1_processor
from tests.reference import Reference
from tests.test_serve import free_port

ROOT = Path(__file__).parents[2]
BETA, TOP_K, LENGTH = 3.0, 8, 12
GUIDED = [([5, 6, 7], "sweet=1"), ([60, 61, 62, 63], "sweet=0.5,sour=-1"), ([70], "sour=2")]
WEIGHTS = [(1.0, 0.0), (0.5, -1.0), (0.0, 2.0)]
UNGUIDED = [{}, {"mavis_weights": "sweet=0"}, {"mavis_weights": "sweet=1", "mavis_beta": 0}]
REFUSED = {
    "mavis_weights": [{"mavis_weights": "salty=1"}, {"mavis_weights": "sweet"}],
    "mavis_beta": [{"mavis_weights": "sweet=1", "mavis_beta": -1}],
    "mavis_top_k": [{"mavis_top_k": 0}],
    "unknown": [{"mavis_strength": 1}, {"mavis-beta": 1}, {"mavis_": 1}],
}


class Scrape:
    """The samples of a text in Prometheus' format."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]
        self.names = {sample.name for sample in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples that have the labels."""
        wanted = labels.items()
        return sum(s.value for s in self.samples if s.name == name and wanted <= s.labels.items())


@pytest.fixture(scope="module", params=["state", "hidden"])
def server(request, base_model, value_model, heads, tmp_path_factory):
    """`trimtab serve` of either kind of value model; its address."""
    model = {"state": value_model, "hidden": heads}[request.param]
    port, log = free_port(), tmp_path_factory.mktemp("log") / "vllm.log"
    command = [
        sys.executable, "-m", "trimtab", "serve", base_model, model,
        "--additional-config", json.dumps({"mavis": {"beta": BETA, "top_k": TOP_K}}),
        "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "128", "--max-num-seqs", "4", "--port", str(port),
    ]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TMPDIR": str(log.parent)}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}", log)
        yield request.param, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def sent(server):
    """The tokens that guided requests were answered with, and a scrape after all requests."""
    kind, address = server

    def ask(prompt, xargs, status=200, **more):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0}
        body |= {"return_token_ids": True, "vllm_xargs": xargs, **more}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=None)
        assert answer.status_code == status, answer.text
        return answer.json()["choices"][0]["token_ids"] if status == 200 else None

    guided = [ask(prompt, {"mavis_weights": weights}) for prompt, weights in GUIDED]
    tokens = sum(map(len, guided))
    for xargs in UNGUIDED:
        tokens += len(ask([8, 9], xargs))
    for of_argument in REFUSED.values():
        for xargs in of_argument:
            ask([8, 9], xargs, 400)
    ask([8, 9], {}, 400, mavis_weights="sweet=1")
    if kind == "hidden":
        tokens += len(ask([5], {"mavis_weights": "sweet=1", "mavis_value_of": 7}, max_tokens=1))
    while True:  # vLLM counts a request's tokens when it has answered
        scrape = Scrape(httpx.get(f"{address}/metrics").text)
        if scrape("vllm:generation_tokens_total") >= tokens:
            return kind, guided, tokens, scrape
        time.sleep(0.1)


def test_a_server_counts_exactly_what_was_sent(sent):
    kind, _, _, scrape = sent
    counts = {
        asks: scrape("mavis:requests_total", model_name="tiny", guidance=asks)
        for asks in ("guided", "unguided", "value")
    }
    assert counts == {"guided": 3, "unguided": 3, "value": kind == "hidden"}
    refused = {
        sample.labels["argument"]: sample.value
        for sample in scrape.samples
        if sample.name == "mavis:refused_requests_total" and sample.value
    }
    assert refused == {**{name: len(of) for name, of in REFUSED.items()}, "misplaced": 1}
    assert scrape("mavis:failures_total") == 0


def test_vllms_own_metrics_stay(sent):
    _, _, tokens, scrape = sent
    assert scrape("vllm:generation_tokens_total", model_name="tiny") == tokens
    assert {"vllm:num_requests_running", "vllm:inter_token_latency_seconds_sum"} <= scrape.names
    series = [(sample.name, *sorted(sample.labels.items())) for sample in scrape.samples]
    ours = [name for name in series if name[0].startswith(("mavis:", "vllm:"))]
    assert len(set(ours)) == len(ours)


def test_steps_tell_the_divergence_of_the_plain_computation(sent, base_model, value_model, heads):
    kind, guided, _, scrape = sent
    reference = Reference(base_model, [{"state": value_model, "hidden": heads}[kind]])
    expected = []
    for (prompt, _), weights, answer in zip(GUIDED, WEIGHTS, guided):
        assert answer == reference.greedy(prompt, LENGTH, weights, BETA, TOP_K, eos=EOS)
        for i in range(len(answer)):
            prefix = prompt + answer[:i]
            policy = reference.distribution(prefix, weights, BETA, TOP_K)
            base = reference.distribution(prefix, weights, 0.0, TOP_K)
            expected.append(sum(p * np.log(p / base[token]) for token, p in policy.items() if p))
    rows = len(expected)
    engine = {"model_name": "tiny", "engine": "0"}
    assert scrape("mavis:guided_rows_total", **engine) == rows
    assert scrape("mavis:guided_candidates_total", **engine) == rows * TOP_K
    assert scrape("mavis:step_kl_nats_count", **engine) == rows
    assert scrape("mavis:step_kl_nats_sum", **engine) == pytest.approx(sum(expected), rel=1e-3)
    for bound in ("0.1", "1.0", "3.0"):
        below = sum(kl <= float(bound) for kl in expected)
        assert scrape("mavis:step_kl_nats_bucket", le=bound, **engine) == below
    assert scrape("mavis:step_time_seconds_count", **engine) == rows  # of one request each
    assert scrape("mavis:step_time_seconds_sum", **engine) > 0


def selectors(expression) -> Iterator[Any]:
    """The vector selectors of a parsed PromQL expression."""
    if type(expression).__name__ == "VectorSelector":
        yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        yield from selectors(getattr(expression, name)) if hasattr(expression, name) else ()
    for argument in getattr(expression, "args", ()):
        yield from selectors(argument)


def test_the_dashboard_asks_for_what_a_server_tells(sent):
    promql_parser = pytest.importorskip("promql_parser")
    _, _, _, scrape = sent
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "mavis.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    variables = {f"${each['name']}" for each in dashboard["templating"]["list"]}
    asked = set()
    for target in targets:
        used = set(re.findall(r"\$\w+", target["expr"]))
        assert used <= {*variables, "$__rate_interval"}
        text = target["expr"].replace("$__rate_interval", "5m").replace("$model_name", "tiny")
        for selector in selectors(promql_parser.parse(text)):
            wanted = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            by = set(re.findall(r"\bby \((\w+)\)", text))
            assert any(
                sample.name == selector.name
                and wanted.items() <= sample.labels.items()
                and by <= set(sample.labels)
                for sample in scrape.samples
            ), text
            asked.add(selector.name)
    assert {name for name in asked if name.startswith("vllm:")}
    ours = {name for name in scrape.names if re.match(r"mavis:.*_(total|bucket)$", name)}
    assert ours <= asked, "every metric of ours is shown"


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_processors_of_one_process_share_their_metrics(base_model, value_model, heads):
    """As an `LLM` made twice, and without a folder for those of several processes."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins import vllm_internals

    labels = {"model_name": "twice", "engine": "0"}
    for i, model in enumerate((value_model, heads, value_model), start=1):
        mavis = {"value_models": [str(model)]}
        processor = v1_processor(base_model, mavis, served_model_name="twice")
        request = sampling((1.0, 0.0), extra_args={"mavis_top_k": 5})
        processor.update_state(BatchUpdate(1, [], [(0, request, [5, 6], [])], []))
        vllm_internals._newest.rows = torch.randn(1, 64)
        processor.apply(torch.randn(1, VOCAB_SIZE))
        assert counted("mavis:guided_rows_total", **labels) == i
        assert counted("mavis:guided_candidates_total", **labels) == 5 * i
        assert counted("mavis:step_time_seconds_count", **labels) == i


def test_a_step_that_fails_is_counted(base_model, heads):
    from vllm.v1.sample.logits_processor import BatchUpdate

    from trimtab.plugins import vllm_internals

    mavis = {"value_models": [str(heads)]}
    processor = v1_processor(base_model, mavis, served_model_name="failing")
    labels = {"model_name": "failing", "engine": "0"}
    processor.update_state(BatchUpdate(1, [], [(0, sampling((1.0, 0.0)), [5, 6], [])], []))
    for rows in (1, 2, 1, 2, 2):
        vllm_internals._newest.rows = torch.randn(rows, 64)
        processor.apply(torch.randn(1, VOCAB_SIZE))
    assert processor.failures == {"MissingHiddenStates": 3}
    assert counted("mavis:failures_total", kind="step", **labels) == 3
    assert counted("mavis:step_time_seconds_count", **labels) == 2
    processor.update_state(BatchUpdate(1, [], [(0, sampling((1.0,)), [5, 6], [])], []))
    assert counted("mavis:failures_total", kind="request", **labels) == 1
    assert counted("mavis:failures_total", kind="step", **labels) == 3


def metrics(name):
    from trimtab.plugins.metrics import StepMetrics

    return StepMetrics(
        SimpleNamespace(
            model_config=SimpleNamespace(served_model_name=name),
            parallel_config=SimpleNamespace(data_parallel_index=0),
        )
    )


def test_a_device_is_read_when_it_is_ready(monkeypatch):
    """A meta device holds no data, so that reading it at once would be an error."""
    labels = {"model_name": "late", "engine": "0"}
    steps, done = metrics("late"), []

    def to_host(tensor):
        assert tensor.device.type == "meta"
        number = len(copies)
        copies.append(torch.tensor([[0.5, torch.nan], [4.0, 7.0]])[:, : tensor.shape[1]])
        return copies[-1], lambda: number in done

    copies = []
    monkeypatch.setattr("trimtab.plugins.metrics.to_host", to_host)
    for step, ready in enumerate(([], [], [0], [0, 1, 2], [0, 1, 2, 3])):
        done[:] = ready
        if step < 4:
            rows = torch.empty(1 + step % 2, 3, device="meta")
            steps.record(rows, rows, torch.empty(len(rows), dtype=torch.bool, device="meta"))
        steps.end_step(0.01)
        # A row that is not guided, as only the device knows, is not counted.
        assert counted("mavis:guided_rows_total", **labels) == len(ready)
        assert counted("mavis:guided_candidates_total", **labels) == 4 * len(ready)
    assert counted("mavis:step_kl_nats_sum", **labels) == 2.0
    assert counted("mavis:step_time_seconds_count", **labels) == 4


def test_many_observations_are_those_of_one_each():
    from prometheus_client import CollectorRegistry, Histogram

    from trimtab.plugins.metrics import KL_BUCKETS, _Histogram

    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.lognormal(-2, 3, 500), KL_BUCKETS, [0.0]]).astype(np.float32)
    one, all_, registry = (
        Histogram("one", "", buckets=KL_BUCKETS, registry=None),
        _Histogram("all", "", buckets=KL_BUCKETS, registry=None),
        CollectorRegistry(),
    )
    for number in numbers:
        one.observe(float(number))
    all_.observe_all(numbers.astype(np.float64))
    all_.observe_all(np.zeros(0))
    registry.register(one)
    registry.register(all_)
    for suffix, labels in (
        ("_count", {}),
        *(("_bucket", {"le": str(bound)}) for bound in (*KL_BUCKETS, "+Inf")),
    ):
        expected = registry.get_sample_value(f"one{suffix}", labels)
        assert registry.get_sample_value(f"all{suffix}", labels) == expected is not None
    total = registry.get_sample_value("one_sum")
    assert registry.get_sample_value("all_sum") == pytest.approx(total)
