import copy
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.conftest import wait_until_up
from trimtab.plugins import MAVISValueHeads, MAVISValueModel
from trimtab.trainers import samplers
from trimtab.trainers.rollouts import collect_rollouts, read_rollouts
from trimtab.trainers.samplers import (
    ServerSampler,
    TransformersSampler,
    cut_at_end,
    divergence,
    prompt_log_probs,
)
from trimtab.trainers.trees import TreeConfig

from .conftest import END, ROOT, VOCABULARY, make_model, make_tokenizer
from .test_mavis_trainer import trainer
from .test_rollouts import same

GUIDED = TreeConfig(top_k=5, temperature=0.7)
WEIGHTS, BETA = {"sweet": 1.0, "sour": -0.5}, 2.0


@pytest.fixture(scope="module")
def value_model(tmp_path_factory):
    """Folder of a value model of two objectives with a random head."""
    model = MAVISValueModel.from_base_model(
        make_model(), list(WEIGHTS), num_hidden_layers=2, tokenizer=make_tokenizer()
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    folder = tmp_path_factory.mktemp("values")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def heads(base_model, tmp_path_factory):
    """Folder of heads of two objectives that say something at random."""
    model = MAVISValueHeads.from_base_model(
        base_model, list(WEIGHTS), tokenizer=make_tokenizer(), candidate_scale=[0.8, 1.3]
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name != "action_table":
            torch.nn.init.normal_(parameter, std=0.3)
    model.write_table(make_model().get_input_embeddings().weight.detach())
    folder = tmp_path_factory.mktemp("heads")
    model.save_pretrained(folder)
    return str(folder)


def naive_policies(prefix, value_model):
    """`log pi` and `log pi_ref` by token, at GUIDED's temperature, from whole forward passes."""
    model = MAVISValueModel.load(value_model).eval()
    with torch.inference_mode():
        base = make_model()
        logits = base(torch.tensor([prefix])).logits[0, -1].double()
        top, tokens = logits.topk(GUIDED.top_k)
        if model.config.head_type == "hidden":
            hidden = base.model(torch.tensor([prefix])).last_hidden_state[:, -1]
            values = model.candidate_values(hidden, tokens[None])[0].double()
            values = values * torch.tensor(model.config.candidate_scale)
        else:
            continued = torch.tensor([[*prefix, token] for token in tokens.tolist()])
            values = model(continued).logits[:, -1].double()
        score = top + BETA * values @ torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    policies = (torch.log_softmax(x / GUIDED.temperature, 0).tolist() for x in (score, top))
    return [dict(zip(tokens.tolist(), policy)) for policy in policies]


def check_guided(sampler, value_model):
    """Tokens follow the MAVIS policy, and come with their log-ratios and the KL of their steps."""
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(1, 18, size=n).tolist() for n in (1, 9, 4, 2)]
    pieces = sampler(prefixes, [1, 6, 20, 20], [0, 1, 2, 3], WEIGHTS)
    for prefix, piece in zip(prefixes, pieces):
        assert len(piece.log_ratios) == len(piece.kls) == len(piece.tokens)
        for t, token in enumerate(piece.tokens):
            policy, reference = naive_policies([*prefix, *piece.tokens[:t]], value_model)
            expected = policy[token] - reference[token]
            assert piece.log_ratios[t] == pytest.approx(expected, abs=1e-3)
            expected = sum(np.exp(p) * (p - reference[a]) for a, p in policy.items())
            assert piece.kls[t] == pytest.approx(expected, abs=1e-3)
    count, prefix = 2000, [2, 5, 8, 3]
    pieces = sampler([prefix] * count, [1] * count, list(range(count)), WEIGHTS)
    policy, _ = naive_policies(prefix, value_model)
    observed = np.bincount([piece.tokens[0] for piece in pieces], minlength=20)
    assert observed.sum() == sum(observed[token] for token in policy)
    expected = np.exp(list(policy.values()))
    assert chisquare([observed[t] for t in policy], count * expected).pvalue > 1e-3
    mean_ratio = np.mean([piece.log_ratios[0] for piece in pieces])
    assert mean_ratio == pytest.approx(pieces[0].kls[0], abs=0.05)
    # The same sampler also samples the base model.
    assert sampler(prefixes, [3] * 4, [0] * 4)[0].kls == []


@pytest.mark.parametrize("kind", ["value_model", "heads"])
def test_transformers_samples_the_guided_policy(kind, base_model, request):
    value_model = request.getfixturevalue(kind)
    check_guided(
        TransformersSampler(base_model, GUIDED, {END}, [value_model], BETA, batch_size=2000),
        value_model,
    )


def test_impossible_candidates_diverge_by_nothing():
    policy = np.array([np.log(0.5), np.log(0.5), -np.inf])
    step = (np.array([4, 5, 6]), policy, np.log([0.25, 0.75, 1e-9]))
    ratios, kls = divergence([5], [step], 1.0)
    assert ratios == pytest.approx([np.log(0.5 / 0.75)])
    assert kls == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)])


def test_end_token_survives_padding_that_looks_like_it():
    assert cut_at_end([5, 6, END, END, END], 5, {END}) == [5, 6, END]
    assert cut_at_end([5, 6, 7, END], 3, {END}) == [5, 6, 7]
    assert cut_at_end([END, END], 2, {END}) == [END]


def check_continuations(sampler, config):
    """Pieces end at an end token or at their length, and repeat with their seeds."""
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(1, 18, size=n).tolist() for n in (1, 3, 9, 4, 7, 2) * 6]
    lengths = [4, 1, 12, 30, 30, 30] * 6
    seeds = list(range(36))
    pieces = sampler(prefixes, lengths, seeds)
    for piece, limit in zip((piece.tokens for piece in pieces), lengths):
        assert 1 <= len(piece) <= limit
        assert END not in piece[:-1] and (len(piece) == limit or piece[-1] == END)
    assert any(piece.tokens[-1] == END for piece in pieces), "the end is kept"
    assert sampler(prefixes, lengths, seeds) == pieces
    assert sampler(prefixes, lengths, [seed + 100 for seed in seeds]) != pieces


def check_frequencies(sampler, model, top_k, top_p=1.0):
    """First tokens follow the model's own distribution over its `top_k` likeliest, and of those
    over the fewest that have the probability `top_p` together."""
    import torch

    prefix = [2, 5, 8, 3]
    count = 2000
    pieces = sampler([prefix] * count, [1] * count, list(range(count)))
    with torch.inference_mode():
        logits = model(torch.tensor([prefix])).logits[0, -1].float()
    probabilities = torch.zeros_like(logits)
    likeliest = logits.topk(top_k or len(logits)).indices
    probabilities[likeliest] = logits[likeliest].softmax(-1)
    taken = 0.0
    for token in likeliest:
        probability = float(probabilities[token])
        probabilities[token] *= taken < top_p
        taken += probability
    observed = np.bincount([piece.tokens[0] for piece in pieces], minlength=len(logits))
    possible = probabilities.numpy() > 0
    assert observed[~possible].sum() == 0
    expected = probabilities.double().numpy()[possible]
    assert chisquare(observed[possible], count * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (5, 0.6)])
def test_transformers_samples_the_base_model(top_k, top_p):
    model = make_model()
    config = TreeConfig(top_k=top_k, top_p=top_p)
    sampler = TransformersSampler(model, config, {END}, batch_size=4)
    check_continuations(sampler, config)
    wide = TransformersSampler(model, config, {END}, batch_size=500)
    check_frequencies(wide, model, top_k, top_p)


# What checkpoints ship to chat well with: not the base model that values are of.
HOSTILE = {
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": [4, 5, 6, 7],
    "bad_words_ids": [[8]], "min_new_tokens": 4, "top_p": 0.3, "min_p": 0.5, "temperature": 0.1,
    "typical_p": 0.2, "forced_eos_token_id": 9, "max_length": 5, "exponential_decay_length_penalty":
    [1, 2.0], "begin_suppress_tokens": [10], "num_beams": 3, "do_sample": False,
    "renormalize_logits": True, "stop_strings": ["a"], "encoder_repetition_penalty": 2.0,
}  # fmt: skip


def test_the_checkpoints_generation_config_has_no_part_in_the_base_model():
    plain, other = make_model(), make_model()
    for name, value in HOSTILE.items():
        setattr(other.generation_config, name, value)
    before = copy.deepcopy(other.generation_config)
    pieces = [
        TransformersSampler(model, TreeConfig(top_k=0), {END})(
            [[5, 6, 7]] * 16, [30] * 16, [0] * 16
        )
        for model in (plain, other)
    ]
    assert pieces[0] == pieces[1]
    assert other.generation_config.to_dict() == before.to_dict()


def test_transformers_sampler_leaves_the_random_state_alone():
    sampler = TransformersSampler(make_model(), TreeConfig(), {END})
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    sampler([[4, 5]], [5], [1])
    assert torch.equal(torch.rand(3), expected)


def test_vllm_samples_the_base_model(base_model, tmp_path):
    pytest.importorskip("vllm")
    # A checkpoint with a generation config of its own, asked for by name
    shutil.copytree(base_model, tmp_path / "base")
    hostile = {"repetition_penalty": 3.0, "top_p": 0.3, "temperature": 0.1, "max_new_tokens": 2}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(hostile))
    base_model = str(tmp_path / "base")
    script = textwrap.dedent(
        f"""
        from tests.trainers.conftest import END, make_model
        from tests.trainers.test_samplers import check_continuations, check_frequencies
        from trimtab.trainers.rollouts import grow_trees
        from trimtab.trainers.trees import TreeConfig
        from trimtab.trainers.samplers import VLLMSampler
        config = TreeConfig(max_completion_length=12, layers=3, top_k=5)
        sampler = VLLMSampler(
            {base_model!r}, config, {{END}}, max_model_len=64,
            init_kwargs=dict(
                enforce_eager=True, dtype="float32", distributed_executor_backend="uni",
                generation_config="auto",
            ),
        )
        check_continuations(sampler, config)
        check_frequencies(sampler, make_model(), 5)
        sampler.config = TreeConfig(top_k=5, top_p=0.6)
        check_frequencies(sampler, make_model(), 5, 0.6)
        sampler.config = config
        prompts = [(i, [2, 4 + i, 3]) for i in range(6)]
        trees = grow_trees(sampler, prompts, config, {{END}})
        assert any(tree.response(i)[-1] == END for tree in trees for i in tree.leaves())
        assert grow_trees(sampler, prompts, config, {{END}}) == trees
        sampler.close()
        """
    )
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def run(script):
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_vllm_samples_the_guided_policy(base_model, value_model, heads):
    pytest.importorskip("vllm")
    run(
        f"""
        import os
        from tests.trainers.conftest import END
        from tests.trainers.test_samplers import BETA, GUIDED, check_guided
        from trimtab.trainers.samplers import VLLMSampler
        for folder in {[value_model, heads]!r}:  # an engine for every iteration
            sampler = VLLMSampler(
                {base_model!r}, GUIDED, {{END}}, 64, [folder], BETA,
                init_kwargs=dict(
                    enforce_eager=True, dtype="float32", distributed_executor_backend="uni"
                ),
            )
            check_guided(sampler, folder)
            sampler.close()
            # Engines of the user's own in this process are as she has set them.
            assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
        """
    )


def test_server_that_does_not_answer_is_named(base_model):
    with socket.socket() as probe:  # a port that nobody listens at
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(
            ConnectionError, match=rf"no vLLM server answers .*{url}/v1.*vllm serve"
        ):
            ServerSampler(base_model, [url], TreeConfig(), {END})


@contextmanager
def serving(model, fault=None):
    """
    An HTTP server that answers as vLLM's does, and what it was asked. After a few requests it has
    the `fault`: "dies" with the connections open, "fails" with status 500, or "hangs".
    """
    asked = []
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "served", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            if len(asked) > 5 and fault == "hangs":
                release.wait()
            elif len(asked) > 5 and fault == "fails":
                self.send_error(500)
                return
            elif len(asked) > 5 and fault == "dies":
                self.connection.close()
                return
            # The answer depends on the prompt, so that none can be mistaken for another.
            answer = [body["prompt"][0], END]
            choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": answer}
            if "prompt_logprobs" in body:
                found = prompt_log_probs(model, body["prompt"])
                rows = [{str(t): {"logprob": x}} for t, x in zip(body["prompt"][1:], found)]
                choice["prompt_logprobs"] = [None, *rows]
            self.answer(
                {"id": "1", "object": "text_completion", "created": 0, "model": "served",
                 "choices": [choice]}
            )  # fmt: skip

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        release.set()
        server.shutdown()
        thread.join()
        server.server_close()


TOKENS = np.random.default_rng(0).integers(1, 18, size=100).tolist()


def test_server_of_other_weights_is_refused():
    pytest.importorskip("openai")
    model, other = make_model(), make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    reference = TOKENS, prompt_log_probs(model, TOKENS)
    rounded = make_model().to(torch.bfloat16)
    for served, refused in ((model, False), (rounded, False), (other, True)):
        with serving(served) as (url, _):
            if refused:
                message = (
                    rf"vllm_server_base_url='{url}/v1/' serves 'served' with other weights.*nats"
                )
                with pytest.raises(ValueError, match=message):
                    ServerSampler("base", [url], TreeConfig(), {END}, reference)
            else:
                ServerSampler("base", [url], TreeConfig(), {END}, reference)


@pytest.mark.parametrize("fault", ["dies", "fails", "hangs"])
def test_a_server_that_fails_is_left_out_and_the_others_do_its_work(monkeypatch, fault):
    pytest.importorskip("openai")
    monkeypatch.setattr(samplers, "SERVER_RETRIES", 0)
    monkeypatch.setattr(samplers, "SERVER_TIMEOUT", 20.0 if fault == "hangs" else 600.0)
    warnings = []
    monkeypatch.setattr(samplers.logger, "warning", warnings.append)
    prefixes = [[i] for i in range(200)]
    with serving(None) as (sound, asked), serving(None, fault) as (broken, asked_too):
        sampler = ServerSampler("served", [broken, sound], TreeConfig(), {END})
        for _ in range(2):
            pieces = sampler(prefixes, [3] * 200, [1] * 200)
            assert [piece.tokens for piece in pieces] == [[i, END] for i in range(200)]
        assert len(asked) > 200 and len(asked_too) > 5
    assert len(warnings) == 1
    assert f"'{broken}/v1' is left out, its work goes to ['{sound}/v1']" in warnings[0]


def test_rollouts_over_two_real_servers_survive_the_death_of_one(
    base_model, tokenizer, tmp_path, monkeypatch
):
    """Every tree is there once, and is what a server alone would have sampled."""
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    prompts = [f"a b {word}" for word in VOCABULARY[4:]]
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    config = TreeConfig(max_completion_length=12, layers=3, top_k=5)
    reference = TOKENS, prompt_log_probs(make_model(), TOKENS)
    complete, answered = ServerSampler._complete, 0

    def collect(name, urls):
        trees = collect_rollouts(
            tmp_path / name, prompts, {}, tokenizer, prompt_ids, {}, config, {END},
            lambda: ServerSampler(base_model, urls, config, {END}, reference), {}, batch_size=5,
        )  # fmt: skip
        return list(trees)

    with vllm_servers(base_model, tmp_path, 2) as ((one, url), (_, other)):

        async def kill_one_after_a_while(*args):
            nonlocal answered
            answered += 1
            if answered == 40:
                os.killpg(one.pid, signal.SIGKILL)
            return await complete(*args)

        alone = collect("alone", [other])
        monkeypatch.setattr(ServerSampler, "_complete", kill_one_after_a_while)
        monkeypatch.setattr(samplers, "SERVER_RETRIES", 2)
        warnings = []
        monkeypatch.setattr(samplers.logger, "warning", warnings.append)
        shared = collect("shared", [url, other])
        assert len(warnings) == 1 and f"'{url}/v1' is left out" in warnings[0]
    assert shared == alone == list(read_rollouts(tmp_path / "shared"))
    assert [tree.prompt_index for tree in shared] == list(range(len(prompts)))


@contextmanager
def vllm_servers(model, folder, count):
    """The processes and URLs of so many `vllm serve`."""
    servers = []
    try:
        for number in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
                "--dtype", "float32", "--enforce-eager", "--max-model-len", "128",
                "--max-num-seqs", "32", "--host", "127.0.0.1", "--port", str(port),
            ]  # fmt: skip
            env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
            log = (folder / f"server-{number}.log").open("w")
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
            servers.append((process, f"http://127.0.0.1:{port}"))
        for number, (process, url) in enumerate(servers):
            wait_until_up(process, url, folder / f"server-{number}.log")
        yield servers
    finally:
        for process, _ in servers:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine, too, where it has died itself
            process.wait()


def test_requests_are_shared_and_no_server_left_is_an_error(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(samplers, "SERVER_RETRIES", 0)
    with serving(None) as (one, asked), serving(None) as (other, asked_too):
        sampler = ServerSampler("served", [one, other], TreeConfig(), {END})
        sampler([[i] for i in range(200)], [3] * 200, [1] * 200)
        assert len(asked) + len(asked_too) == 200 and min(len(asked), len(asked_too)) > 20
    with pytest.raises(ConnectionError, match=rf"no vLLM server answers.*({one}|{other}).*again"):
        sampler([[1]], [3], [1])


def test_later_iterations_go_on_from_what_servers_sampled(base_model, tmp_path, monkeypatch):
    """As the refusal of servers for several iterations says."""
    pytest.importorskip("openai")
    fields = {"head_type": "hidden", "top_k": 5, "layers": 1}
    with serving(make_model()) as (url, asked):
        made = trainer(base_model, tmp_path, vllm_server_base_url=url, **fields)
        made.collect_rollouts()
        assert asked
    expected = read_rollouts(tmp_path / "rollouts" / "train")
    with pytest.raises(ValueError, match="with num_iterations=1, then set num_iterations=2"):
        trainer(base_model, tmp_path, vllm_server_base_url=url, num_iterations=2, **fields)
    made = trainer(base_model, tmp_path, use_vllm=True, num_iterations=2, **fields)
    monkeypatch.setattr(made._collection, "make_sampler", lambda _: pytest.fail("samples again"))
    made.collect_rollouts()
    same(made._iterations.trees, expected)


def test_requests_leave_nothing_to_the_servers_defaults():
    """All that vLLM takes from a generation config where a request says nothing."""
    pytest.importorskip("openai")
    with serving(make_model()) as (url, asked):
        config = TreeConfig(top_k=7, temperature=0.5, top_p=0.9)
        sampler = ServerSampler("served", [url], config, {END})
        assert sampler([[4, 5]], [3], [1])[0].tokens == [4, END]
    (request,) = asked
    defaults = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 3,
    }  # fmt: skip
    assert {name: request[name] for name in defaults} == defaults


def test_every_field_that_vllm_would_fill_is_sent():
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    from trimtab.trainers.samplers import NEUTRAL

    filled = set(protocol.CompletionRequest._DEFAULT_SAMPLING_PARAMS.default)
    assert filled <= {*NEUTRAL, "temperature", "top_k", "top_p", "max_tokens"}
