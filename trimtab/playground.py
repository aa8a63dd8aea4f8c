"""`trimtab playground`: a page on a `vllm serve` that guides, which asks with guidance and without.

It is a client like any other: it learns of the objectives from `GET /v1/mavis/objectives`, streams
both answers side by side, and shows the guided request to copy. Nothing is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import shlex
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.plugins.cli import bad_input
from trimtab.plugins.client import Server, api_key, find_server
from trimtab.plugins.params import MAX_KL

LARGEST_GAP = 4.0  # nats, of the full colour
# Of a request's fields those that an OpenAI client does not know
OF_VLLM = ("return_token_ids", "vllm_xargs")
LEGEND = """<small>A token is coloured by how much likelier the base model finds its own first
choice there: not at all where it is the first choice, <span style="{full}">full</span> from
{nats:g} nats on. At temperature 0 guidance alone chooses others; above 0 chance does, too: compare
the unguided answer.</small>"""
NO_COLOURS = """<small>Tokens are not coloured: the server's log-probabilities are not those of the
base model (<code>--logprobs-mode {mode}</code>).</small>"""


@dataclass
class Answer:
    """One answer as far as it has come.

    Args:
        tokens: Text of each token, nats by which the base model finds its first choice likelier,
            and that first choice.
        token_ids: Only where the request asks for them.
        error: Why it ended early.
    """

    tokens: list[tuple[str, float, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(text for text, _, _ in self.tokens)


def playground(arguments: list[str]) -> int:
    """Serves the page until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="trimtab playground",
        description="A page on a server that guides: sliders for the weights, answers with "
        "guidance and without side by side, and the request to copy. GRADIO_SERVER_PORT chooses "
        "the page's port, OPENAI_API_KEY is the server's key.",
    )
    parser.add_argument(
        "--base-url", "--base_url", metavar="URL", required=True,
        help="of the server, for example http://localhost:8000/v1",
    )  # fmt: skip
    parser.add_argument(
        "--reward_funcs", "--reward-funcs", metavar="REWARD", nargs="+", default=[],
        help="show these rewards, NAME=MODULE:FUNCTION or NAME=MODEL_ID as `trimtab train` takes "
        "them; a plot of the first two fills as answers come",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    with bad_input("playground"):
        reward_funcs = load_rewards(options.reward_funcs)
        page(find_server(options.base_url), reward_funcs).launch(footer_links=[])
    return 0


def load_rewards(specs: Sequence[str]) -> dict[str, Any]:
    """Reward functions by name."""
    if not specs:
        return {}
    from trimtab.trainers.cli import load_reward_func
    from trimtab.trainers.rewards import load_reward_funcs

    return load_reward_funcs(dict(load_reward_func(spec) for spec in specs))


def xargs(
    server: Server, weights: Mapping[str, float], beta: float, kl_budget: float
) -> dict[str, Any]:
    """The guided request's `vllm_xargs`; a `kl_budget` of 0 is none."""
    found = {"mavis_weights": json.dumps(dict(weights)), "mavis_beta": beta}
    if not kl_budget and "kl_budget" in server.defaults:
        kl_budget = MAX_KL  # left out, the server's own would hold
    return {**found, "mavis_kl_budget": kl_budget} if kl_budget else found


def as_call(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body as the arguments of an OpenAI client."""
    known = {key: value for key, value in body.items() if key not in OF_VLLM}
    return {**known, "extra_body": {key: body[key] for key in OF_VLLM if key in body}}


def as_curl(url: str, body: Mapping[str, Any]) -> str:
    """The shell command that sends a request."""
    key = '  -H "Authorization: Bearer $OPENAI_API_KEY" \\\n' if api_key() != "EMPTY" else ""
    return (
        f"curl -N {shlex.quote(url + '/chat/completions')} \\\n{key}"
        f"  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}\n"
    )


def as_python(url: str, body: Mapping[str, Any]) -> str:
    """The program that sends a request."""
    given = "".join(f"    {key}={value!r},\n" for key, value in as_call(body).items())
    key = ', api_key="EMPTY"' if api_key() == "EMPTY" else ""  # else the client finds it
    return (
        "from openai import OpenAI\n\n"
        f"client = OpenAI(base_url={url!r}{key})\n"
        f"stream = client.chat.completions.create(\n{given})\nfor chunk in stream:\n"
        '    print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
    )


async def ask(url: str, bodies: Sequence[Mapping[str, Any]]) -> AsyncIterator[list[Answer]]:
    """Sends requests at once.

    Yields:
        The answers so far, ten times a second until all have ended.
    """
    from openai import AsyncOpenAI

    answers = [Answer() for _ in bodies]
    async with AsyncOpenAI(base_url=url, api_key=api_key(), max_retries=0) as client:
        tasks = [asyncio.create_task(listen(client, *pair)) for pair in zip(bodies, answers)]
        try:
            while not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=0.1)
                yield answers
        finally:
            for task in tasks:
                task.cancel()  # of a page that was closed


async def listen(client: Any, body: Mapping[str, Any], answer: Answer) -> None:
    """Fills `answer` as its tokens come, or with the server's error."""
    from httpx import HTTPError
    from openai import APIStatusError, OpenAIError

    held: list[Any] = []  # tokens whose text has not come yet: part of a character, or of a stop
    try:
        async for chunk in await client.chat.completions.create(**as_call(body)):
            if not chunk.choices:
                continue
            (choice,) = chunk.choices
            answer.token_ids += getattr(choice, "token_ids", None) or []
            held += (choice.logprobs and choice.logprobs.content) or []
            if text := choice.delta.content:
                answer.tokens += told_apart(text, held)
                held = []
    except APIStatusError as error:
        said = error.body.get("message") if isinstance(error.body, dict) else None
        answer.error = f"HTTP {error.status_code}: {said or error.message}"
    except (OpenAIError, HTTPError, ValueError) as error:  # a stream that breaks off is no JSON
        answer.error = f"{client.base_url} does not answer: {error}"


def told_apart(text: str, held: Sequence[Any]) -> list[tuple[str, float, str]]:
    """`Answer.tokens` of a piece of text; one of several tokens where they do not spell it."""
    gaps = []
    for token in held:
        first = max(token.top_logprobs, key=lambda top: top.logprob, default=token)
        gaps.append((token.token, max(0.0, first.logprob - token.logprob), first.token))
    if "".join(spelt for spelt, _, _ in gaps) == text:
        return gaps
    _, gap, first = max(gaps, key=lambda each: each[1], default=("", 0.0, ""))
    return [(text, gap, first)]


def colour(gap: float) -> str:
    return f"background: rgb(255 150 30 / {min(gap / LARGEST_GAP, 1):.2f})"


def show(name: str, answer: Answer, coloured: bool) -> str:
    """An answer as HTML."""
    parts = []
    for text, gap, first in answer.tokens:
        style = f' style="{colour(gap)}" title="{gap:.2f} nats' if coloured and gap else ""
        style += f' below {html.escape(repr(first))}"' if style else ""
        parts.append(f"<span{style}>{html.escape(text)}</span>")
    head = f"<b>{name}</b>"
    if coloured and (changed := sum(gap > 0 for _, gap, _ in answer.tokens)):
        head += f", {changed} of {len(answer.tokens)} not the base model's first choice"
    error = f'<p role="alert" style="color: #b00020">{html.escape(answer.error)}</p>'
    body = f'<div style="white-space: pre-wrap">{"".join(parts)}</div>'
    return f"{head}{body}{error if answer.error else ''}"


async def rewards_of(
    reward_funcs: Mapping[str, Any], prompt: str, answers: Sequence[Answer]
) -> list[dict[str, float]]:
    """Every answer's rewards by name."""
    from trimtab.trainers.rewards import compute_rewards

    asked = [[{"role": "user", "content": prompt}]] * len(answers)
    said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
    ids = [answer.token_ids for answer in answers]
    columns = {
        name: await asyncio.to_thread(compute_rewards, name, function, asked, said, ids, {})
        for name, function in reward_funcs.items()
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(len(answers))]


def page(server: Server, reward_funcs: Mapping[str, Any]) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr
    import pandas as pd

    names = ("unguided", "guided")
    objectives, defaults = list(server.objectives), server.defaults
    weights = defaults["weights"] or {objectives[0]: 1.0}
    coloured = server.logprobs_mode.startswith("raw")
    with gr.Blocks(title="trimtab playground", analytics_enabled=False) as blocks:
        prompt = gr.Textbox(
            "Tell me about city parks.", label=f"Prompt to {server.model.split('/')[-1]}"
        )
        with gr.Row():
            sliders = [
                gr.Slider(-limit, limit, weight, step=0.05, label=name, buttons=[])
                for name in objectives
                for weight in [weights.get(name, 0.0)]
                for limit in [max(1.0, abs(weight))]
            ]
        with gr.Row():
            most = max(16.0, 2 * defaults["beta"])
            beta = gr.Slider(0, most, defaults["beta"], step=0.1, label="beta", buttons=[])
            budget = defaults.get("kl_budget", 0.0)
            kl_budget = gr.Slider(
                0, max(1.0, budget), budget, step=0.01, label="KL budget (0: none)", buttons=[]
            )
            temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature", buttons=[])
            max_tokens = gr.Number(64, precision=0, minimum=1, label="tokens")
        send = gr.Button("Send", variant="primary")
        with gr.Row():
            shown = [gr.HTML(show(name, Answer(), coloured), padding=True) for name in names]
        legend = LEGEND if coloured else NO_COLOURS
        gr.HTML(
            legend.format(full=colour(LARGEST_GAP), nats=LARGEST_GAP, mode=server.logprobs_mode)
        )
        table = gr.HTML(padding=True)
        points = gr.State([])
        axes = [*reward_funcs][:2]
        plot = gr.ScatterPlot(
            x=axes[0] if axes else None, y=axes[-1] if axes else None, color="answer",
            visible=len(axes) == 2, label="All answers so far", tooltip="all",
        )  # fmt: skip
        with gr.Accordion("The guided request", open=False):
            curl = gr.Code(language="shell", label="curl", interactive=False)
            python = gr.Code(language="python", label="Python", interactive=False)

        async def play(
            prompt: str, beta: float, kl_budget: float, temperature: float, max_tokens: int,
            points: list[dict[str, Any]], *weights: float,
        ) -> AsyncIterator[dict[Any, Any]]:  # fmt: skip
            body = {
                "model": server.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens, "temperature": temperature, "stream": True,
                "logprobs": True, "top_logprobs": 2,  # vLLM lists the sampled token first
                **({"return_token_ids": True} if reward_funcs else {}),
            }  # fmt: skip
            given = xargs(server, dict(zip(objectives, weights)), beta, kl_budget)
            guided = {**body, "vllm_xargs": given}
            yield {curl: as_curl(server.url, guided), python: as_python(server.url, guided)}
            # Without guidance, whatever the server's defaults are
            bodies = [{**body, "vllm_xargs": {"mavis_beta": 0}}, guided]
            async for answers in ask(server.url, bodies):
                texts = (show(name, each, coloured) for name, each in zip(names, answers))
                yield dict(zip(shown, texts))
            if not reward_funcs or any(answer.error for answer in answers):
                return
            try:
                rewards = await rewards_of(reward_funcs, prompt, answers)
            except Exception as error:  # the user's own functions raise what they like
                traceback.print_exc()
                answers[-1].error = str(error)
                yield {shown[-1]: show(names[-1], answers[-1], coloured)}
                return
            rows = [{"answer": name, **each} for name, each in zip(names, rewards)]
            points = [*points, *rows]
            as_html = pd.DataFrame(rows).to_html(index=False, border=0, float_format="%.3f")
            yield {table: as_html, state: points, plot: pd.DataFrame(points)}

        state = points
        gr.on(
            [send.click, prompt.submit], play,
            [prompt, beta, kl_budget, temperature, max_tokens, state, *sliders],
            [*shown, curl, python, table, state, plot],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return blocks
