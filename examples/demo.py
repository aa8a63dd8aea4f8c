"""The whole of MAVIS in one run: train value models, serve them with one flag, steer by weights.

SmolLM2-135M-Instruct is sampled and four reward functions judge it; value heads on its hidden state
learn to predict them; `vllm serve` loads these; held-out prompts are answered over HTTP under a
sweep of weights. Leaves `demo.png`, `demo.json` and `responses.md` in `artifacts/demo`. About 15
minutes on two CPU cores; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rewards
from smollm2 import smollm2
from tqdm import tqdm

HERE = Path(__file__).parent
REWARDS = {
    "positivity": rewards.positivity,
    "relevance": rewards.relevance,
    "readability": rewards.readability,
    "rarity": rewards.rarity,
}
CONFLICT = ("readability", "rarity")  # the pair whose rewards oppose each other within a prompt
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
BEST_OF = 4
BETA, TOP_K, MAX_TOKENS = 8.0, 40, 48
TEST_PROMPTS, UNGUIDED_SAMPLES, GUIDED_SAMPLES, KL_RESPONSES = 40, 8, 2, 12


@dataclass(frozen=True)
class Setting:
    """One point of the sweep: a name and the weights that its requests send."""

    name: str
    weights: dict[str, float]


def settings() -> list[Setting]:
    """No guidance, every objective alone, and the mixes of the conflicting pair."""
    one, other = CONFLICT
    alone = [Setting(name, {name: 1.0}) for name in REWARDS]
    mixed = [
        Setting(f"{one} {1 - mix:g} + {other} {mix:g}", {one: 1 - mix, other: mix})
        for mix in MIXES[1:-1]
    ]
    return [Setting("unguided", {}), *alone, *mixed]


@contextmanager
def serve(base: Path, value_model: Path, log: Path) -> Iterator[str]:
    """A `vllm serve` with the flag, up and healthy; yields its address and ends it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Seeded requests: vLLM's CPU runner fails on one whose prompt it prefills in chunks.
    config = {"mavis": {"value_models": [str(value_model)], "beta": BETA, "top_k": TOP_K}}
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(base),
        "--logits-processors", "trimtab.plugins.vllm:MAVISLogitsProcessor",
        "--additional-config", json.dumps(config),
        "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "512", "--max-num-seqs", "32", "--enforce-eager",
        "--no-enable-chunked-prefill", "--block-size", "32",
    ]  # fmt: skip
    print("==", " ".join(command[:6]), f"'{command[6]}'", *command[7:], flush=True)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 600
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text().splitlines()[-30:])
                raise RuntimeError(f"vllm serve did not start, see {log}:\n{tail}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()


async def sample(address: str, base: Path, prompts: list[Any], path: Path) -> list[dict[str, Any]]:
    """Responses of every setting to every prompt, appended to `path` as they come."""
    from openai import AsyncOpenAI

    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # without the line that an interruption cut off
    path.write_text(text)
    done = [json.loads(line) for line in text.splitlines()]
    known = {(r["setting"], r["prompt"], r["sample"]) for r in done}
    jobs = [
        (setting, i, s)
        for setting in settings()
        for s in range(GUIDED_SAMPLES if setting.weights else UNGUIDED_SAMPLES)
        for i in range(len(prompts))
        if (setting.name, i, s) not in known
    ]
    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)
    gate = asyncio.Semaphore(32)

    async def one(setting: Setting, i: int, s: int) -> dict[str, Any]:
        body: dict[str, Any] = {"top_k": TOP_K, "return_token_ids": True}
        if setting.weights:
            body["vllm_xargs"] = {"mavis_weights": json.dumps(setting.weights)}
        async with gate:
            answer = await client.chat.completions.create(
                model=str(base),
                messages=prompts[i],
                max_tokens=MAX_TOKENS,
                temperature=1.0,
                seed=1000 * i + s,
                extra_body=body,
            )
        choice = answer.choices[0]
        return {
            "setting": setting.name,
            "prompt": i,
            "sample": s,
            "text": choice.message.content,
            "prompt_ids": answer.prompt_token_ids,
            "response_ids": choice.token_ids,
        }

    tasks = [asyncio.create_task(one(*job)) for job in jobs]
    with path.open("a") as out:
        for task in tqdm(asyncio.as_completed(tasks), total=len(tasks), desc="responses"):
            done.append(await task)
            out.write(json.dumps(done[-1]) + "\n")
            out.flush()
    return done


def response_kl(base: Path, value_model: Path, responses: list[dict[str, Any]]) -> np.ndarray:
    """KL of each response's guided policy to the base model, in nats: exact at every step, summed.

    Both policies are over the `TOP_K` candidates; the path is the response that was sampled.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.plugins import GuidanceParams, MAVISValueModel
    from trimtab.plugins.heads import HeadGuide
    from trimtab.plugins.policy import step_kl

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    guide = HeadGuide([MAVISValueModel.load(str(value_model))], 1, torch.device("cpu"))
    weights = {setting.name: setting.weights for setting in settings()}
    total = np.zeros(len(responses))
    for i, r in enumerate(tqdm(responses, desc="KL of responses")):
        chosen = (weights[r["setting"]].get(name, 0.0) for name in guide.objectives)
        guide.start(0, GuidanceParams(tuple(chosen), beta=BETA, top_k=TOP_K))
        steps = len(r["response_ids"])
        with torch.inference_mode():
            tokens = torch.tensor([r["prompt_ids"] + r["response_ids"][:-1]])
            hidden = model.model(tokens).last_hidden_state[0, -steps:]  # what the heads read
            logits = model.lm_head(hidden)
            (rows,) = guide.plan(np.zeros(steps, dtype=np.int64))
            candidates, log_policy, scale = guide.log_probs(logits, hidden, rows)
            kl = step_kl(log_policy, logits.gather(1, candidates) - scale)
        total[i] = kl.sum()
    return total


def measure(prompts: list[Any], responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Rewards of every response; gains over no guidance in its standard deviations, by prompt."""
    texts = [[{"role": "assistant", "content": r["text"]}] for r in responses]
    asked = [prompts[r["prompt"]] for r in responses]
    for name, reward in REWARDS.items():
        for r, value in zip(responses, reward(prompts=asked, completions=texts)):
            r[name] = value

    def by_prompt(setting: str, objective: str) -> np.ndarray:  # [prompts, samples]
        rows: list[list[float]] = [[] for _ in prompts]
        for r in sorted(responses, key=lambda r: (r["prompt"], r["sample"])):
            if r["setting"] == setting:
                rows[r["prompt"]].append(r[objective])
        return np.array(rows)

    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(prompts), (4000, len(prompts)))
    result: dict[str, Any] = {"unguided": {}, "settings": {}, "best_of": {}, "correlation": {}}
    for objective in REWARDS:
        base = by_prompt("unguided", objective)
        mean, std = base.mean(), base.std()
        result["unguided"][objective] = {"mean": mean, "std": std}
        picked = base.reshape(-1, BEST_OF).argmax(1)  # of each group of samples of one prompt
        rewards_of = {name: by_prompt("unguided", name) for name in REWARDS}
        result["best_of"][objective] = {
            name: (np.take_along_axis(x.reshape(-1, BEST_OF), picked[:, None], 1).mean() - x.mean())
            / x.std()
            for name, x in rewards_of.items()
        }
        for setting in settings()[1:]:
            difference = (by_prompt(setting.name, objective).mean(1) - base.mean(1)) / std
            low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
            entry = result["settings"].setdefault(setting.name, {"weights": setting.weights})
            entry[objective] = {"gain": difference.mean(), "low": low, "high": high}
    for a in REWARDS:
        for b in REWARDS:
            x, y = by_prompt("unguided", a), by_prompt("unguided", b)
            x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
            result["correlation"][f"{a}, {b}"] = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Left, the gain of each objective under every weight; right, the front of the conflict."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    width = 0.8 / len(REWARDS)
    for i, objective in enumerate(REWARDS):
        entries = [result["settings"][name] for name in REWARDS]
        gains = np.array([e[objective]["gain"] for e in entries])
        errors = np.array([[e[objective][k] for e in entries] for k in ("low", "high")])
        x = np.arange(len(REWARDS)) + (i - (len(REWARDS) - 1) / 2) * width
        left.bar(x, gains, width, yerr=np.abs(errors - gains), capsize=2, label=objective)
        left.plot(
            [x[i] - width / 2, x[i] + width / 2],
            [result["best_of"][objective][objective]] * 2,
            "k-",
            lw=2,
        )
    left.set_xticks(
        range(len(REWARDS)),
        [f"{name}\nKL {result['settings'][name]['kl']['mean']:.0f} nats" for name in REWARDS],
    )
    left.axhline(0, color="grey", lw=0.8)
    left.set_xlabel("objective with weight 1 in the request")
    left.set_ylabel("gain in mean reward (unguided standard deviations)")
    left.set_title(f"Held-out prompts, 95 % intervals; black: best of {BEST_OF}")
    left.legend(title="reward", fontsize=8)

    one, other = CONFLICT
    front = [one, *(s.name for s in settings()[1 + len(REWARDS) :]), other]
    points = np.array([[result["settings"][n][o]["gain"] for o in CONFLICT] for n in front])
    right.plot(points[:, 0], points[:, 1], "o-", label="MAVIS, weights of the request")
    for mix, point in zip(MIXES, points):
        right.annotate(
            f"{1 - mix:g} / {mix:g}", point, textcoords="offset points", xytext=(6, 6), fontsize=8
        )
    right.plot(0, 0, "ks", label="unguided")
    best = np.array([[result["best_of"][picked][o] for o in CONFLICT] for picked in CONFLICT])
    right.plot(best[:, 0], best[:, 1], "k^", label=f"best of {BEST_OF} by one of the rewards")
    right.set_xlabel(f"gain in {one}")
    right.set_ylabel(f"gain in {other}")
    correlation = result["correlation"][f"{one}, {other}"]
    right.set_title(f"Two objectives that conflict (correlation {correlation:.2f})")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def side_by_side(prompts: list[Any], responses: list[dict[str, Any]]) -> str:
    """Three held-out prompts with one response of each setting."""
    lines = ["# Sampled responses", ""]
    for i in (0, len(prompts) // 3, 2 * len(prompts) // 3):
        lines += [f"**{prompts[i][-1]['content']}**", "", "| weights | response |", "| --- | --- |"]
        for setting in settings()[: 1 + len(REWARDS)]:
            text = next(
                r["text"]
                for r in responses
                if (r["setting"], r["prompt"], r["sample"]) == (setting.name, i, 0)
            )
            lines.append(f"| {setting.name} | {' '.join(text.split())} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    artifacts = parser.parse_args().artifacts
    out = artifacts / "demo"
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def stage(title: str) -> None:
        print(f"== [{(time.monotonic() - started) / 60:4.1f} min] {title}", flush=True)

    stage("the base model")
    base = smollm2(artifacts / "smollm2")
    value_model = artifacts / "value_model"
    if not (value_model / "model.safetensors").exists():
        stage("training the value model: rollouts, then regression")
        subprocess.run(
            [sys.executable, "-m", "trimtab", "train", "--config",
             HERE / "train_value_models.yaml", "--model_name_or_path", base,
             "--output_dir", value_model, "--rollout_dir", artifacts / "rollouts"],
            check=True,
        )  # fmt: skip
    rows = [json.loads(line) for line in (HERE / "prompts.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows if row["split"] == "test"][:TEST_PROMPTS]

    stage(f"serving and sweeping the weights over HTTP (log: {out / 'vllm.log'})")
    stored = out / "responses.jsonl"
    trained = (value_model / "model.safetensors").stat().st_mtime
    if stored.exists() and stored.stat().st_mtime < trained:
        stored.unlink()  # another value model's
    with serve(base, value_model, out / "vllm.log") as address:
        responses = asyncio.run(sample(address, base, prompts, stored))

    stage("measuring rewards and KL")
    result = measure(prompts, responses)
    ordered = sorted(responses, key=lambda r: (r["setting"], r["sample"], r["prompt"]))
    chosen = {
        setting.name: [r for r in ordered if r["setting"] == setting.name][:KL_RESPONSES]
        for setting in settings()[1:]
    }
    kls = response_kl(base, value_model, [r for rs in chosen.values() for r in rs])
    for name, kl in zip(chosen, kls.reshape(len(chosen), -1)):
        error = float(kl.std() / np.sqrt(len(kl)))
        result["settings"][name]["kl"] = {"mean": float(kl.mean()), "sem": error}
    result["parameters"] = {
        "beta": BETA, "top_k": TOP_K, "max_tokens": MAX_TOKENS, "prompts": len(prompts),
        "samples": {"unguided": UNGUIDED_SAMPLES, "guided": GUIDED_SAMPLES},
        "minutes": (time.monotonic() - started) / 60,
    }  # fmt: skip
    (out / "demo.json").write_text(json.dumps(result, indent=2, default=float) + "\n")
    (out / "responses.md").write_text(side_by_side(prompts, responses))
    plot(result, out / "demo.png")

    print((out / "responses.md").read_text())
    for setting in settings()[1:]:
        entry = result["settings"][setting.name]
        gains = ", ".join(
            f"{o} {entry[o]['gain']:+.2f} [{entry[o]['low']:+.2f}, {entry[o]['high']:+.2f}]"
            for o in REWARDS
        )
        print(f"{setting.name:34s} {gains}   KL {entry['kl']['mean']:.1f} nats")
    stage(f"done: {out / 'demo.png'}, {out / 'demo.json'}, {out / 'responses.md'}")
    command = Path(sys.executable).with_name("trimtab")
    config = json.dumps({"mavis": {"beta": BETA}})
    print(
        f"To play: {command} serve {base} {value_model} --additional-config '{config}', and once "
        f"it is up: {command} playground --base-url http://localhost:8000/v1"
    )


if __name__ == "__main__":
    main()
