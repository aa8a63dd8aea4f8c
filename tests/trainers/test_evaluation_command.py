"""`trimtab evaluate`: from prompts and a value model to the report of the front."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.__main__ import main
from trimtab.plugins.value_config import load_config
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers.evaluation import command
from trimtab.trainers.samplers import TransformersSampler

REWARDS = """
def odd(completion_ids, **kwargs):
    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]


def early(completions, **kwargs):
    return [float(sum(word < "e" for word in c[0]["content"].split())) for c in completions]


def broken(completions, **kwargs):
    return [1.0]
"""
REWARD_FUNCS = ["sweet=evaluate_rewards:odd", "sour=evaluate_rewards:early"]


@pytest.fixture(scope="module")
def value_model(base_model, tokenizer, tmp_path_factory):
    """A value model with a random head."""
    model = MAVISValueModel.from_base_model(
        base_model, ["sweet", "sour"], num_hidden_layers=1, tokenizer=tokenizer
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight, std=0.15)
    model.save_pretrained(folder := tmp_path_factory.mktemp("value"))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with prompts and reward functions."""
    rows = [
        {"prompt": [{"role": "user", "content": word}], "split": split}
        for split, words in (("train", "ab"), ("test", "cdef"))
        for word in words
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "evaluate_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(base_model, value_model, *flags, **options):
    options = {
        "dataset_name": "prompts.jsonl", "output_dir": "out", "max_completion_length": 6,
        "use_vllm": "false", "weight_steps": 2, **options,
    }  # fmt: skip
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    try:
        return main(["evaluate", str(base_model), str(value_model), *given, *flags])
    except SystemExit as ended:
        return ended.code


def report():
    found = json.loads(Path("out/front.json").read_text())
    points = {(p["strength"], tuple(p["weights"].values())): p for p in found["points"]}
    return found, points


def test_the_front_is_reported_and_a_second_run_samples_nothing(
    folder, base_model, value_model, capsys, monkeypatch
):
    sampled = []
    call = TransformersSampler.__call__
    monkeypatch.setattr(
        TransformersSampler, "__call__", lambda *args: sampled.append(args[1:]) or call(*args)
    )
    flags = ["--reward_funcs", *REWARD_FUNCS, "--betas", "2", "6"]
    assert run(base_model, value_model, *flags) == 0
    files = capsys.readouterr().out.split()
    assert files == [f"out/front.{ending}" for ending in ("json", "md", "png", "html")]
    assert all((folder / file).stat().st_size for file in files)
    found, points = report()
    grid = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert set(points) == {(1.0, ()), *((beta, w) for beta in (2.0, 6.0) for w in grid)}
    assert found["prompts"] == 4, "of the split test"
    assert points[1.0, ()]["kl"]["value"] == 0 and points[1.0, ()]["kl_kind"] == "exact"
    assert all(0 < points[2.0, w]["kl"]["value"] < points[6.0, w]["kl"]["value"] for w in grid)
    # What was asked of the sampler: weights times beta, two responses to each prompt
    assert len(sampled) == 2 * len(points)
    weights = [json.dumps(call[3]) for call in sampled]
    assert sorted(set(weights)) == sorted(
        ["null", *(json.dumps({"sweet": b}) for b in (2.0, 6.0)),
         *(json.dumps({"sour": b}) for b in (2.0, 6.0)),
         *(json.dumps({"sweet": b / 2, "sour": b / 2}) for b in (2.0, 6.0))]
    )  # fmt: skip
    assert len({tuple(call[2]) for call in sampled}) == 2, "seeds are paired between points"

    stored = [json.loads(path.read_text()) for path in (folder / "out" / "points").iterdir()]
    (unguided,) = (
        np.array([[r["token_ids"] for r in row["responses"]] for row in
                  sorted((row for row in stored if not row["weights"]), key=lambda r: r["seed"])],
                 dtype=object),
    )  # fmt: skip
    odd = [[sum(i % 2 for i in ids) for ids in row] for row in unguided]
    assert found["unguided"]["sweet"]["mean"] == pytest.approx(np.mean(odd))

    sampled.clear()
    assert run(base_model, value_model, *flags) == 0
    assert sampled == [] and report()[0]["points"] == found["points"]
    assert run(base_model, value_model, *flags, max_completion_length=5) == 0
    assert len(sampled) == 2 * len(points), "responses of another length are no use"


@contextmanager
def guided_server(value_model, objectives=("sweet", "sour"), defaults=None, **change):
    """A server that says that it guides by `value_model`, and what it was sent."""
    received = []
    made = {"provenance": load_config(str(value_model)).provenance or {}, "value_model": "theirs"}
    said = {
        "objectives": [{"name": name, **made, **change} for name in objectives],
        "defaults": {"weights": {}, "beta": 1.0, "top_k": 40, **(defaults or {})},
        "logprobs_mode": "raw_logprobs",
    }
    models = {"object": "list", "data": [{"id": "m", "object": "model"}]}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, found, status=200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def do_GET(self):
            self.answer(said if self.path == "/v1/mavis/objectives" else models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(body)
            if body["max_tokens"] > 6:
                return self.answer({"error": {"message": "too long"}}, 400)
            choice = {"index": 0, "text": "a b", "token_ids": [7, 8 + body["seed"]]}
            self.answer({"id": "1", "object": "text_completion", "choices": [choice]})

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def test_a_server_is_asked_for_the_weights_and_tells_no_kl(folder, base_model, value_model):
    with guided_server(value_model) as (url, received):
        flags = ["--reward_funcs", *REWARD_FUNCS, "--vllm_server_base_url", url]
        assert run(base_model, value_model, *flags, seeds=1) == 0
    guided = [body["vllm_xargs"] for body in received]
    assert all(xargs["mavis_top_k"] == 40 for xargs in guided)
    told = {(xargs.get("mavis_weights"), xargs["mavis_beta"]) for xargs in guided}
    assert told == {
        (None, 0), ('{"sweet": 4.0}', 1), ('{"sour": 4.0}', 1), ('{"sweet": 2.0, "sour": 2.0}', 1),
    }  # fmt: skip
    points = report()[1]
    assert points[4.0, (1.0, 0.0)]["kl"] is None and points[1.0, ()]["kl"]["value"] == 0


@pytest.mark.parametrize(
    ("served", "options", "message"),
    [
        ({"objectives": ["sweet"]}, {}, "does not guide by 'sour', but by ['sweet']"),
        ({"provenance": {"of": "others"}}, {}, "guides 'sweet' by another value model, 'theirs'"),
        ({"defaults": {"kl_budget": 0.1}}, {}, "has the kl_budget 0.1, which weakens `betas`"),
        ({}, {"max_completion_length": 7}, "the server refuses, Error code: 400"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(
    folder, base_model, value_model, capsys, served, options, message
):
    with guided_server(value_model, **served) as (url, _):
        flags = ["--reward_funcs", *REWARD_FUNCS, "--vllm_server_base_url", url]
        assert run(base_model, value_model, *flags, **options) == 2
    _, said, error = capsys.readouterr().err.partition("trimtab evaluate: error: ")
    assert said and message in error and "vllm_server_base_url" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "none.jsonl"}, "dataset_name: there is no file 'none.jsonl'"),
        ({"dataset_test_split": "all"}, "dataset_test_split: 'prompts.jsonl' has no split 'all'"),
        ({"dataset_name": "answers.jsonl"}, "'answers.jsonl' has no column 'prompt'"),
        ({"weight_steps": 0}, "`weight_steps` must be at least 1, got 0"),
        ({"betas": 0}, "`betas` must be different numbers above 0, got [0.0]"),
        ({"reward_funcs": "tasty=evaluate_rewards:odd"}, "'tasty' is no objective of"),
        ({"beta": 2}, "unknown keys beta"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    folder, base_model, value_model, capsys, options, message
):
    (folder / "answers.jsonl").write_text('{"answer": "a"}')
    flags = [] if "reward_funcs" in options else ["--reward_funcs", *REWARD_FUNCS]
    assert run(base_model, value_model, *flags, **options) == 2
    _, said, error = capsys.readouterr().err.partition("trimtab evaluate: error: ")
    assert said and message in error and "Traceback" not in error


def test_what_fails_while_it_works_keeps_its_trace(folder, base_model, value_model):
    """The command shortens what its caller can mend in the arguments, and nothing else."""
    with pytest.raises(ValueError, match="'sweet' returned 1"):
        run(base_model, value_model, "--reward_funcs", "sweet=evaluate_rewards:broken")


def test_without_vllm_it_says_what_to_do(folder, base_model, value_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert run(base_model, value_model, "--reward_funcs", *REWARD_FUNCS, use_vllm="true") == 2
    error = capsys.readouterr().err
    assert "needs vllm" in error and "use_vllm=False" in error and "Traceback" not in error


def test_models_are_given_before_flags_or_in_the_yaml_file(
    folder, base_model, value_model, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(command, "evaluate_value_model", lambda *a: asked.append(a) or [])
    (folder / "evaluate.yaml").write_text(
        f"model_name_or_path: {base_model}\nvalue_model: {value_model}\noutput_dir: out\n"
        f"dataset_name: prompts.jsonl\nreward_funcs: [{REWARD_FUNCS[0]}]\nbetas: [1, 2]\n"
    )
    assert main(["evaluate", "--config", "evaluate.yaml", "--seeds", "3"]) == 0
    ((args, _, prompts, reward_funcs),) = asked
    assert (args.value_model, args.betas, args.seeds) == (str(value_model), [1, 2], 3)
    assert len(prompts) == 4 and list(reward_funcs) == ["sweet"]
    with pytest.raises(SystemExit):
        main(["evaluate", str(base_model), "--config", "evaluate.yaml"])
    assert "give MODEL and VALUE_MODEL before all flags" in capsys.readouterr().err
