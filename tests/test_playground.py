"""The playground: what it sends and shows, and a real server clicked through in Chromium."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gradio")
from benchmarks.playground import chromium, playground, wait_for
from tests.conftest import wait_until_up
from trimtab.__main__ import main
from trimtab.playground import as_curl, as_python, ask, show, told_apart, xargs
from trimtab.plugins.client import Server, find_server

WEIGHTS = {"sweet": 0.5, "it's ünï": -1.0}
BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": 'Say "it\'s" $HOME\n`now` ü'}],
    "max_tokens": 4,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 2,
    "return_token_ids": True,
    "vllm_xargs": {"mavis_weights": json.dumps(WEIGHTS), "mavis_beta": 2.5},
}


@contextmanager
def fake_server(get=lambda path: (404, {"detail": "Not Found"}), chunks=(), status=200):
    """A server that keeps what it was sent: yields its address and the list of requests."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, kind, text):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            status, found = get(self.path)
            self.answer(status, "application/json", json.dumps(found))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((body, self.headers.get("Authorization")))
            if status != 200:
                found = {"error": {"message": "mavis_beta must be <b>, got -1", "code": status}}
                return self.answer(status, "application/json", json.dumps(found))
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self.answer(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", received
        server.shutdown()


def asked(url, *bodies):
    async def last():
        async for answers in ask(url, bodies):
            found = answers
        return found

    return asyncio.run(last())


@pytest.mark.parametrize("key", [None, "secret"])
def test_what_is_copied_sends_what_the_page_sent(key, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with fake_server() as (url, received):
        asked(url, BODY)
        subprocess.run(["bash", "-c", as_curl(url, BODY)], check=True, capture_output=True)
        (tmp_path / "copied.py").write_text(as_python(url, BODY))
        subprocess.run([sys.executable, tmp_path / "copied.py"], check=True)
    page, curl, python = received
    assert page == python and curl[0] == page[0] == BODY
    assert page[1] == f"Bearer {key or 'EMPTY'}" and curl[1] == (key and page[1])
    assert key is None or key not in as_curl(url, BODY) + as_python(url, BODY)


def chunk(text, *tokens):
    """A chunk of a stream; tokens are `(text, log-probability, the likeliest and its)`."""
    content = [
        {
            "token": token,
            "logprob": logprob,
            "bytes": None,
            "top_logprobs": [
                {"token": t, "logprob": x, "bytes": None} for t, x in ((token, logprob), first)
            ],
        }
        for token, logprob, first in tokens
    ]
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": content}}
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny",
            "choices": [{**choice, "token_ids": [7] * len(tokens)}]}  # fmt: skip


def test_tokens_carry_how_far_below_the_first_choice_they_are():
    chunks = [
        chunk(""),
        chunk("Hi", ("Hi", -0.5, ("Hi", -0.5))),
        chunk(" <b>you", (" <b>", -3.0, (" there", -1.0)), ("you", -1.0, ("you", -1.0))),
        # A character of two tokens, whose text comes with the second
        chunk("", ("\ufffd", -2.0, ("!", -0.5))),
        chunk("é", ("\ufffd", -0.1, ("\ufffd", -0.1))),
    ]
    with fake_server(chunks=chunks) as (url, _):
        (answer,) = asked(url, BODY)
    assert answer.tokens == [
        ("Hi", 0.0, "Hi"), (" <b>", 2.0, " there"), ("you", 0.0, "you"), ("é", 1.5, "!"),
    ]  # fmt: skip
    assert answer.text == "Hi <b>you\u00e9" and answer.token_ids == [7] * 5
    page = show("guided", answer, coloured=True)
    assert "&lt;b&gt;" in page and "2 of 4 not the base model's first choice" in page
    assert re.findall(r'title="([^"]+)"', page) == [
        "2.00 nats below &#x27; there&#x27;", "1.50 nats below &#x27;!&#x27;",
    ]  # fmt: skip
    assert "style" not in show("guided", answer, coloured=False).split("pre-wrap")[1][2:]
    assert told_apart("no log-probabilities", []) == [("no log-probabilities", 0.0, "")]


def test_an_error_of_the_server_is_the_answers_message():
    with fake_server(status=400) as (url, _):
        refused = asked(url, BODY)[0]
    assert refused.error == "HTTP 400: mavis_beta must be <b>, got -1"
    assert "&lt;b&gt;" in show("guided", refused, True)
    gone = asked(url, BODY)[0]
    assert gone.error.startswith(f"{url}/ does not answer: ") and gone.tokens == []


def test_no_kl_budget_lifts_the_servers_own():
    def server(**defaults):
        return Server(
            "url", "tiny", {"a": {}}, {"weights": {}, "beta": 1, **defaults}, "raw_logits"
        )

    assert xargs(server(), {"a": 1}, 2, 0) == {"mavis_weights": '{"a": 1}', "mavis_beta": 2}
    assert xargs(server(kl_budget=0.1), {"a": 1}, 2, 0)["mavis_kl_budget"] == 1e6
    assert xargs(server(kl_budget=0.1), {"a": 1}, 2, 0.2)["mavis_kl_budget"] == 0.2


@pytest.mark.parametrize(
    ("get", "said"),
    [
        (lambda path: (404, {}), "lists no objectives: start it by `trimtab serve"),
        (lambda path: (401, {}), "OPENAI_API_KEY"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(get, said, capsys):
    with fake_server(get) as (url, _):
        assert exit_code("--base-url", url) == 2
        assert said in (error := capsys.readouterr().err) and url in error
    assert exit_code("--base-url", url.removesuffix("/v1")) == 2  # nobody listens now
    assert f"no answer from {url!r}" in capsys.readouterr().err
    assert exit_code("--base-url", url, "--reward_funcs", "good") == 2
    assert "name=module:function" in capsys.readouterr().err


def exit_code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["playground", *arguments])
    return ended.value.code


REWARDS = """
def words(completions, **kwargs):
    return [float(len(c[0]["content"].split())) for c in completions]


def early(completions, completion_ids, **kwargs):
    return [sum(i < 50 for i in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def server(base_model, value_model, tmp_path_factory):
    """The process and the address of a `vllm serve` with the plugin on tiny models."""
    pytest.importorskip("vllm")
    from tests.test_serve import start

    log = tmp_path_factory.mktemp("log") / "vllm.log"
    process, port = start(base_model, {"value_models": [str(value_model)], "beta": 3}, log)
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}", log)
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}/v1")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium is not installed: apt-get install --no-install-recommends chromium "
    "chromium-driver",
)
def test_a_click_through(server, base_model, tmp_path):
    pytest.importorskip("selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_server(server.url)
    assert [*found.objectives] == ["sweet", "sour"] and found.logprobs_mode == "raw_logprobs"
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    flags = ["--reward_funcs", "words=tiny_rewards:words", "early=tiny_rewards:early"]
    with playground(server.url, *flags, folder=tmp_path) as address, chromium() as driver:

        def all_of(xpath):
            return driver.find_elements(By.XPATH, xpath)

        def field(label, kind):
            return f"//*[normalize-space(text())='{label}']/following::input[@type='{kind}'][1]"

        def answers():  # as [(text, title)] of their tokens
            return [
                [(e.get_property("textContent"), e.get_attribute("title")) for e in div]
                for name in ("unguided", "guided")
                for div in [all_of(f"//b[.='{name}']/following-sibling::div[1]/span")]
            ]

        def rewarded():  # once both rows are there
            rows = [row.text.split() for row in all_of("//tr[td]")]
            found = {row[0]: [float(x) for x in row[1:]] for row in rows if len(row) == 3}
            return found if len(found) == 2 else None

        def send(until):
            (button,) = wait_for(lambda: all_of("//button[normalize-space()='Send']"))
            button.click()
            return wait_for(until)

        driver.get(address)
        (prompt,) = wait_for(lambda: all_of("//textarea"))
        prompt.clear()
        prompt.send_keys("w5 w6 w7")
        (tokens,) = all_of(field("tokens", "number"))
        tokens.send_keys(Keys.CONTROL, "a")
        tokens.send_keys("12")
        (slider,) = all_of(field("sour", "range"))
        slider.send_keys(Keys.ARROW_LEFT * 10)
        rewards = send(rewarded)
        unguided, guided = answers()
        assert unguided and guided and unguided != guided

        # Colours, of a plain forward pass of the base model
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
        messages = [{"role": "user", "content": "w5 w6 w7"}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        for shown in (unguided, guided):
            text = list(ids)
            for span, title in shown:  # of several tokens, where they came at once
                gaps = []
                for token_id in tokenizer.encode(span, add_special_tokens=False):
                    with torch.no_grad():
                        log_probs = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
                    gaps.append(float(log_probs.max() - log_probs[token_id]))
                    text.append(token_id)
                told = float(title.split(" nats below ")[0]) if title else 0.0
                assert told == pytest.approx(max(gaps), abs=0.02)
            assert len(text) == len(ids) + 12
        assert not any(title for _, title in unguided), "greedy, without guidance"
        assert any(title for _, title in guided)

        words = {
            name: "".join(token for token, _ in shown).split()
            for name, shown in (("unguided", unguided), ("guided", guided))
        }
        assert {name: row[0] for name, row in rewards.items()} == {
            name: len(each) for name, each in words.items()
        }

        (opened,) = all_of("//button[contains(., 'The guided request')]")
        opened.click()
        (curl, *_) = wait_for(lambda: all_of("//*[contains(@class, 'cm-content')]"))
        sent = curl.get_property("textContent")
        assert '\\"sour\\": -0.5' in sent and '"max_tokens": 12' in sent

        # What the server refuses, and a server that is gone
        tokens.send_keys(Keys.CONTROL, "a")
        tokens.send_keys("100000")
        refused = send(lambda: all_of("//*[@role='alert']"))
        assert [each.text.startswith("HTTP 400: ") for each in refused] == [True, True]
        assert "100000" in refused[0].text and "Traceback" not in driver.page_source
        server.process.terminate()
        server.process.wait()
        send(lambda: len([e for e in all_of("//*[@role='alert']") if "not answer" in e.text]) == 2)
        assert "Traceback" not in driver.page_source
