"""Fronts of the demo's four rewards: MAVIS beside fine-tuned policies, best-of-N and prompting.

    python benchmarks/pareto.py            # everything, an interrupted run goes on

MAVIS guides with a state head on the demo's rollouts (`heads.py` says how to train it).
All policies sample from the 40 likeliest tokens of the base model, on held-out prompts. The
fine-tuned ones (`_policies.py`) are LoRA policies trained with GRPO; Rewarded Soups average their
weights, MOD their log-probabilities, MORLHF trains on the weighted reward. Several processes may
share the work: `--methods` takes a part of it, the last run without it writes the report
(`docs/pareto.json`, `.md`, `.png`, `.html`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.plugins import GuidanceParams, MAVISValueModel, ValueEngine
from trimtab.plugins.guide import Guide
from trimtab.trainers import (
    PairwiseJudge,
    Policy,
    Response,
    evaluate,
    judge_points,
    read_rollouts,
    simplex_weights,
    sweep,
    write_report,
)

sys.path.insert(0, str(Path(__file__).parent))
import _judges
from _decoding import Member, add_adapters, sample
from _policies import POLICIES, ROOT, Budget, read_prompts, rewards, train_all

OBJECTIVES = ("positivity", "relevance", "readability", "rarity")
CONFLICT = ("readability", "rarity")
BETAS = (4.0, 8.0, 16.0)
AGAINST = 8.0  # the demo's beta
# A hypervolume from -1 asks that no objective is given up; one from -4 hardly does.
REFERENCES = (1.0, 4.0)
BEST_OF = (4, 16, 64)
TOP_K = 40
ROUND = 4  # unguided responses to a prompt that are sampled together
METHODS = (
    "unguided", "MAVIS", "Rewarded Soups", "MOD", "MORLHF", "prompting", "best of N",
)  # fmt: skip
TUNED = {"Rewarded Soups", "MOD", "MORLHF"}
KL_BUDGETS = (2.5, 5.0, 10.0, 20.0, 30.0, 40.0)
INSTRUCTIONS = {
    "positivity": "be very positive and enthusiastic",
    "relevance": "keep strictly to the subject of the request",
    "readability": "use short sentences and short, simple words",
    "rarity": "use rare and sophisticated words",
}

CRITERIA = {
    "positivity": "is more positive in its mood",
    "relevance": "keeps better to the subject of the prompt",
    "readability": "is easier to read",
    "rarity": "uses rarer words",
}


def all_weights() -> list[dict[str, float]]:
    """Every objective alone, the mixes of the conflicting pair, and all alike."""
    alone = [{name: 1.0} for name in OBJECTIVES]
    mixes = [dict(zip(CONFLICT, map(float, w))) for w in simplex_weights(2, 4)[1:-1]]
    return [*alone, *mixes, dict.fromkeys(OBJECTIVES, 0.25)]


class Arms:
    """The methods, over one base model. What a method needs is loaded when it is first used."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        config = json.loads((args.value_model / "config.json").read_text())
        self.scale = dict(
            zip(config["objectives"], zip(config["reward_mean"], config["reward_std"]))
        )
        self._soups: dict[str, Any] = {}

    @cached_property
    def base(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.args.base, dtype=torch.bfloat16)
        return model.to(self.device).eval()

    @cached_property
    def guide(self) -> Guide:
        values = MAVISValueModel.load(str(self.args.value_model))
        rows = self.args.prompts
        engine = ValueEngine(
            [values], num_slots=rows, max_length=512, device=self.device, dtype=torch.bfloat16
        )
        return Guide(engine, rows)

    def ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        return [
            self.tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            for p in prompts
        ]

    def answer(
        self, prompts: Sequence[Any], *args: Any, seed: int, repeats: int = 1
    ) -> list[Response]:
        """Responses of `_decoding.sample`, those of one prompt side by side."""
        # A shared machine's clock says little about one thread; its CPU time does.
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        started = clock()
        samples = sample(
            self.base,
            self.ids(prompts),
            *args,
            eos_token_id=self.tokenizer.eos_token_id,
            top_k=TOP_K,
            max_tokens=self.args.max_tokens,
            seed=seed,
            repeats=repeats,
        )
        seconds = (clock() - started) / len(samples)
        ids = [s.token_ids for s in samples]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Response(text, s.token_ids, log_ratio=s.log_ratio, kl=s.kl, seconds=seconds)
            for text, s in zip(texts, samples)
        ]

    def kept(self, name: str, prompts: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` returns, JSON, kept in a file of that name and these prompts."""
        key = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
        path = self.args.artifacts / f"{name}-{key}.json"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(make()) + "\n")
            partial.replace(path)
        return json.loads(path.read_text())

    def pool(
        self, prompts: Sequence[Any], start: int, stop: int
    ) -> tuple[list[list[Response]], dict[str, np.ndarray]]:
        """Unguided responses to each prompt, and their rewards `[prompts, stop - start]`."""

        def make(first: int) -> dict[str, Any]:
            found = self.answer(prompts, seed=10_000 + first, repeats=ROUND)
            asked = [prompt for prompt in prompts for _ in range(ROUND)]
            texts = [r.text for r in found]
            scores = {o: getattr(rewards, o)(prompts=asked, completions=texts) for o in OBJECTIVES}
            return {"responses": [vars(r) for r in found], "rewards": scores}

        rounds = [
            self.kept(f"pool-{first:03d}", prompts, lambda first=first: make(first))
            for first in range(start - start % ROUND, stop, ROUND)
        ]
        part = slice(start % ROUND, start % ROUND + stop - start)
        rows = [
            [Response(**row) for r in rounds for row in r["responses"][i * ROUND : (i + 1) * ROUND]]
            for i in range(len(prompts))
        ]
        scores = {
            o: np.concatenate([np.reshape(r["rewards"][o], (-1, ROUND)) for r in rounds], axis=1)
            for o in OBJECTIVES
        }
        return [row[part] for row in rows], {o: x[:, part] for o, x in scores.items()}

    def unguided(self, prompts: Sequence[Any], weights: Any, seed: int) -> list[Response]:
        return [row[0] for row in self.pool(prompts, seed, seed + 1)[0]]

    def best_of(self, count: int) -> Callable[..., list[Response]]:
        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            rows, scores = self.pool(prompts, seed * count, (seed + 1) * count)
            total = sum(
                weight * (scores[name] - self.scale[name][0]) / self.scale[name][1]
                for name, weight in weights.items()
            )
            return [
                Response(
                    row[i].text,
                    row[i].token_ids,
                    cost=sum(len(r.token_ids) for r in row),
                    seconds=sum(r.seconds or 0.0 for r in row),
                )
                for row, i in zip(rows, np.argmax(total, axis=1))
            ]

        return respond

    def mavis(self, beta: float) -> Callable[..., list[Response]]:
        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            chosen = tuple(weights.get(name, 0.0) for name in self.guide.engine.objectives)
            for slot in range(len(prompts)):
                self.guide.start(slot, GuidanceParams(chosen, beta=beta, top_k=TOP_K))
            return self.answer(prompts, (), self.guide, seed=seed)

        return respond

    def prompting(self, prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
        named = sorted((n for n in weights if weights[n]), key=lambda n: -weights[n])
        heaviest = [n for n in named if weights[n] == weights[named[0]]]
        text = " and ".join(INSTRUCTIONS[n] for n in heaviest)
        if rest := named[len(heaviest) :]:
            text += "; also, but less so, " + " and ".join(INSTRUCTIONS[n] for n in rest)
        told = [
            [*p[:-1], {**p[-1], "content": f"{p[-1]['content']} In your answer, {text}."}]
            for p in prompts
        ]
        return self.answer(prompts, [Member(self.base, self.ids(told), 1.0)], seed=seed)

    def adapter(self, name: str, steps: int) -> str:
        return str(self.args.policies / name.replace(" ", "_") / f"checkpoint-{steps}")

    def soup(self, steps: int, coefficients: Mapping[str, float]) -> Any:
        """The base model with the policies' updates added, each times its coefficient."""
        key = json.dumps([steps, dict(coefficients)])
        if key not in self._soups:
            if len(self._soups) > len(OBJECTIVES):  # 270 MB each
                del self._soups[next(iter(self._soups))]
            self._soups[key] = add_adapters(
                self.base, {self.adapter(n, steps): c for n, c in coefficients.items() if c}
            )
        return self._soups[key]

    def tuned(self, steps: int, name: str, prompts: Sequence[Any], seed: int) -> list[Response]:
        """Responses of one policy: an end of every front of the fine-tuned methods."""

        def make() -> list[dict[str, Any]]:
            member = Member(self.soup(steps, {name: 1.0}), self.ids(prompts), 1.0)
            return [vars(r) for r in self.answer(prompts, [member], seed=seed)]

        adapter = digest(Path(self.adapter(name, steps)) / "adapter_model.safetensors")
        label = f"tuned-{name.replace(' ', '_')}-{steps}-{adapter}-{seed}"
        return [Response(**row) for row in self.kept(label, prompts, make)]

    def soups(self, steps: int) -> Callable[..., list[Response]]:
        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            if len(weights) == 1:
                return self.tuned(steps, next(iter(weights)), prompts, seed)
            member = Member(self.soup(steps, weights), self.ids(prompts), 1.0)
            return self.answer(prompts, [member], seed=seed)

        return respond

    def mod(self, steps: int) -> Callable[..., list[Response]]:
        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            if len(weights) == 1:
                return self.tuned(steps, next(iter(weights)), prompts, seed)
            ids = self.ids(prompts)
            members = [Member(self.soup(steps, {n: 1.0}), ids, w) for n, w in weights.items()]
            return self.answer(prompts, members, seed=seed)

        return respond

    def morlhf(self, steps: int) -> Callable[..., list[Response]]:
        of = {tuple(sorted(w.items())): name for name, w in POLICIES.items()}

        def respond(prompts: Sequence[Any], weights: Mapping[str, float], seed: int) -> Any:
            return self.tuned(steps, of[tuple(sorted(weights.items()))], prompts, seed)

        return respond

    def policies(self) -> list[Policy]:
        """Every arm. Fine-tuned ones at half of their training and all of it."""
        steps = self.args.steps
        model = digest(self.args.value_model / "model.safetensors")
        # What says most comes first: seeds are the outer loop, methods the inner.
        arms = [Policy("unguided", self.unguided, weights=[{}])]
        betas = sorted(self.args.betas, reverse=True)
        arms += [Policy("MAVIS", self.mavis(beta), beta, identity=model) for beta in betas]
        tuned = (("Rewarded Soups", self.soups), ("MOD", self.mod), ("MORLHF", self.morlhf))
        # MORLHF is trained on each of its weights: two mixes, and the ends that all three share.
        own = {"MORLHF": [w for w in POLICIES.values() if set(w) <= set(CONFLICT)]}
        for count in (steps, steps // 2):
            adapters = self.trained(count)
            for name, make in tuned:
                arms.append(
                    Policy(name, make(count), count, weights=own.get(name), identity=adapters)
                )
        arms.append(Policy("prompting", self.prompting))
        largest = max(self.args.best_of)
        for n in self.args.best_of:
            seeds = max(1, min(self.args.seeds, largest // n))  # disjoint parts of one pool
            bound = math.log(n) - (n - 1) / n
            arms.append(Policy("best of N", self.best_of(n), n, seeds=seeds, kl_bound=bound))
        return arms

    def compute(self) -> float:
        """Multiply-adds of a guided token over those of an unguided one: as best-of-N of this N."""
        model = MAVISValueModel.load(str(self.args.value_model))
        small, large = (
            sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (model, self.base)
        )
        # The value model's embedding is looked up, the base model's multiplied for the logits.
        small -= model.get_input_embeddings().weight.numel()
        return 1 + (TOP_K + 1) * small / large  # candidates are read, too

    def trained(self, steps: int) -> str:
        """Which adapters the fine-tuned arms use."""
        files = [Path(self.adapter(name, steps)) / "adapter_model.safetensors" for name in POLICIES]
        return ",".join(digest(file) if file.exists() else "-" for file in files)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes a folder for responses under these settings; refuses one with others'."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n")
    elif (found := json.loads(path.read_text())) != settings:
        raise SystemExit(f"{folder} holds responses under {found}: give another --artifacts")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def rollout_tokens(folder: Path) -> int | None:
    """Tokens that were sampled to train the value model, if its rollouts are there."""
    trees = read_rollouts(folder)
    return sum(len(node.tokens) for tree in trees for node in tree.nodes[1:]) or None


def intro(result: Mapping[str, Any]) -> str:
    """What the tables compare, and what training cost."""
    given, training = result["parameters"], result["training"]
    lines = [
        "# Fronts of the demo's rewards",
        "",
        f"Made by `python benchmarks/pareto.py` on {given['device'].upper()}: held-out prompts of "
        f"the demo, {given['seeds']} seeds, {given['max_tokens']} tokens a response.",
        "",
        f"* Every policy is a distribution over the {given['top_k']} likeliest tokens of the base "
        "model, so its KL to the base model is exact at every step. That of best-of-N is its upper "
        "bound `log N - (N - 1) / N`.",
        "* Strength: `beta` of MAVIS, N of best-of-N, steps of GRPO of the fine-tuned policies.",
        "* Rewarded Soups average the merged weights of the objectives' policies, MOD their "
        "log-probabilities, MORLHF is trained on the weighted reward. With all weight on one "
        "objective the three are the same policy.",
        "* Prompting asks for every objective with a weight, the heaviest first.",
        f"* A guided token takes {given['compute_of_guidance']:.1f} times the multiply-adds of an "
        "unguided one: best-of-N of about this N is equal compute. A token of MOD takes one "
        "forward pass per objective, of Rewarded Soups and MORLHF one.",
        "* Tokens/s are of this benchmark's loop, by CPU time of one thread where there is no GPU. "
        "It runs the base model beside every other to measure KL; [serving.md](serving.md) has the "
        "speed of a server.",
        "",
        "## What training cost",
        "",
        "| GRPO policy | steps | tokens sampled | minutes | reward, first and last step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, record in training["policies"].items():
        lines.append(
            f"| {name} | {record['budget']['steps']} | {record['tokens']:.0f} | "
            f"{record['minutes']:.0f} | {record['reward'][0]:+.2f}, {record['reward'][-1]:+.2f} |"
        )
    budget = next(iter(training["policies"].values()))["budget"]
    lines += [
        "",
        f"LoRA of rank {budget['rank']} on all linear layers, learning rate "
        f"{budget['learning_rate']:g}, KL coefficient {budget['beta']:g}, {budget['completions']} "
        f"completions a step, {budget['generations']} of each prompt; rewards in standard "
        "deviations under the base model.",
    ]
    if training["value_model_tokens"]:
        lines[-1] += (
            f" The value model, all objectives in one, was trained on "
            f"{training['value_model_tokens']} sampled tokens."
        )
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--value-model", type=Path, default=Path("artifacts/state"))
    parser.add_argument("--rollouts", type=Path, default=Path("artifacts/rollouts/train"))
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/pareto"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=Budget.max_tokens)
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS))
    parser.add_argument("--best-of", nargs="+", type=int, default=list(BEST_OF))
    parser.add_argument("--steps", type=int, default=Budget.steps, help="of GRPO")
    parser.add_argument("--kl-budgets", nargs="+", type=float, default=list(KL_BUDGETS))
    parser.add_argument("--methods", nargs="+", help="sample these only, and write no report")
    parser.add_argument("--judge-url", help="OpenAI-compatible endpoint of a language-model judge")
    parser.add_argument("--judge-model", default="judge")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/pareto")
    args = parser.parse_args()
    args.policies = args.artifacts / "policies"
    claim(args.artifacts, {"base": str(args.base), "top_k": TOP_K, "max_tokens": args.max_tokens})

    chosen = set(args.methods or METHODS)
    if unknown := chosen - set(METHODS):
        parser.error(f"--methods {sorted(unknown)[0]!r}: choose from {', '.join(METHODS)}")
    training = {}
    if chosen & TUNED:
        budget = Budget(steps=args.steps, max_tokens=args.max_tokens)
        train = read_prompts("train")
        training = train_all(args.policies, args.base, train, args.value_model, budget)
    prompts = read_prompts("test")[: args.prompts]
    args.prompts = len(prompts)
    arms = Arms(args)
    points = sweep(
        [policy for policy in arms.policies() if policy.method in chosen],
        prompts,
        all_weights(),
        {o: getattr(rewards, o) for o in OBJECTIVES},
        args.artifacts / "points",
        seeds=args.seeds,
        judges={o: getattr(_judges, o) for o in OBJECTIVES},
    )
    if args.methods:
        return
    against = ("MAVIS", AGAINST if AGAINST in args.betas else args.betas[0])
    result = evaluate(points, [CONFLICT], args.kl_budgets, against=against, references=REFERENCES)
    result["parameters"] = {
        "base": str(args.base),
        "value_model": str(args.value_model),
        "device": arms.device,
        "prompts": len(prompts),
        "seeds": args.seeds,
        "top_k": TOP_K,
        "max_tokens": args.max_tokens,
        "compute_of_guidance": arms.compute(),
        "instructions": INSTRUCTIONS,
        "kl_of_best_of_n": "log N - (N - 1) / N, an upper bound",
    }
    result["training"] = {"policies": training, "value_model_tokens": rollout_tokens(args.rollouts)}
    if args.judge_url:
        judge = PairwiseJudge(
            args.judge_url,
            args.judge_model,
            args.artifacts / "judgements.jsonl",
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
        )
        result["language_model_judge"] = judge_points(judge, CRITERIA, points, prompts)
    for file in write_report(result, args.report, intro(result)):
        print(file)


if __name__ == "__main__":
    main()
