"""`trimtab evaluate`: the front of a value model's objectives, from prompts to the report.

Here is what samples for the sweep, in this process or from a server that guides.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trimtab.plugins.client import find_server
from trimtab.plugins.value_config import MAVISValueConfig, load_config

from ..base_model import end_tokens
from ..fingerprints import guidance_fingerprint
from ..samplers import Piece, ServerSampler, TransformersSampler, VLLMSampler
from ..trees import TreeConfig
from .fronts import evaluate
from .points import Point, Policy, Response
from .report import write_report
from .sweep import simplex_weights, sweep


@dataclass
class EvaluateArguments:
    """
    Arguments of `trimtab evaluate`.

    Args:
        model_name_or_path (`str`):
            Base model, a folder or hub id.
        value_model (`str`):
            Folder of the value model.
        dataset_name (`str`):
            Name of a dataset on the Hub, or path of a JSON or Parquet file with a prompt in each
            row.
        reward_funcs (`list[str]`):
            Objectives to weigh, of the value model's, as `name=module:function` or `name=model_id`.
        output_dir (`str`):
            Folder of the responses and of the report.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to answer, of a dataset that has splits.
        betas (`list[float]`, *optional*, defaults to `[4.0]`):
            Strengths of the guidance.
        weight_steps (`int`, *optional*, defaults to `4`):
            Number of parts that the weight of 1 is dealt out to the objectives in.
        seeds (`int`, *optional*, defaults to `2`):
            Number of responses to each prompt, of every point.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature for sampling.
        use_vllm (`bool`, *optional*, defaults to `True`):
            Whether to sample with vLLM in this process, and not with transformers.
        vllm_server_base_url (`str`, *optional*):
            URL of a server that guides by the value model, to sample from instead. It tells no
            log-ratios: the KL is then unknown.
        vllm_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `vllm.LLM` in this process.
    """

    model_name_or_path: str = field(metadata={"help": "Base model, a folder or hub id."})
    value_model: str = field(metadata={"help": "Folder of the value model."})
    dataset_name: str = field(
        metadata={
            "help": "Name of a dataset on the Hub, or path of a JSON or Parquet file with a prompt "
            "in each row."
        }
    )
    reward_funcs: list[str] = field(
        metadata={
            "help": "Objectives to weigh, of the value model's, as `name=module:function` or "
            "`name=model_id`."
        }
    )
    output_dir: str = field(metadata={"help": "Folder of the responses and of the report."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to answer, of a dataset that has splits."}
    )
    betas: list[float] = field(
        default_factory=lambda: [4.0], metadata={"help": "Strengths of the guidance."}
    )
    weight_steps: int = field(
        default=4,
        metadata={
            "help": "Number of parts that the weight of 1 is dealt out to the objectives in."
        },
    )
    seeds: int = field(
        default=2, metadata={"help": "Number of responses to each prompt, of every point."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Maximum number of tokens of a response."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature for sampling."})
    use_vllm: bool = field(
        default=True,
        metadata={"help": "Whether to sample with vLLM in this process, not with transformers."},
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of a server that guides by the value model, to sample from instead. It "
            "tells no log-ratios: the KL is then unknown."
        },
    )
    vllm_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `vllm.LLM` in this process."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.vllm_init_kwargs, str):
            self.vllm_init_kwargs = json.loads(self.vllm_init_kwargs)
        for name in ("weight_steps", "seeds", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}")
        if not self.betas or min(self.betas) <= 0 or len(set(self.betas)) < len(self.betas):
            raise ValueError(f"`betas` must be different numbers above 0, got {self.betas}")


class Refused(ValueError):
    """What is asked for cannot be sampled; the message says what to change."""


class GuidedServerSampler(ServerSampler):
    """A [`ServerSampler`] of a server that guides, whose responses come without log-ratios."""

    def __call__(
        self,
        prefixes: list[list[int]],
        lengths: list[int],
        seeds: list[int],
        weights: Mapping[str, float] | None = None,
    ) -> list[Piece]:
        # A strength of 1, which the weights are multiplied by; 0 where the server has weights.
        guidance: dict[str, Any] = {"mavis_beta": 0}
        if weights:
            guidance = {"mavis_weights": json.dumps(dict(weights)), "mavis_beta": 1}
        self.extra_body = {"vllm_xargs": {**guidance, "mavis_top_k": self.config.top_k}}
        from openai import BadRequestError

        try:
            return asyncio.run(self._sample(list(zip(prefixes, lengths, seeds))))
        except BadRequestError as error:
            raise Refused(f"vllm_server_base_url: the server refuses, {error}") from error


def check_server(url: str, objectives: Sequence[str], config: MAVISValueConfig) -> None:
    """
    Refuses a server that guides by other objectives, by another value model or within a KL budget.

    Args:
        url (`str`):
            Of the server.
        objectives (`list[str]`):
            Those that are weighed.
        config ([`MAVISValueConfig`]):
            Of the value model that is evaluated.
    """
    server = find_server(url)
    if "kl_budget" in server.defaults:
        raise ValueError(
            f"vllm_server_base_url: {url!r} has the kl_budget {server.defaults['kl_budget']:g}, "
            "which weakens `betas`: start it without"
        )
    served = server.objectives
    made = {key: value for key, value in (config.provenance or {}).items() if key != "command"}
    for name in objectives:
        if name not in served:
            raise ValueError(
                f"vllm_server_base_url: {url!r} does not guide by {name!r}, but by {list(served)}"
            )
        if served[name]["provenance"] != json.loads(json.dumps(made)):
            raise ValueError(
                f"vllm_server_base_url: {url!r} guides {name!r} by another value model, "
                f"{served[name]['value_model']!r}: start it with the one that is evaluated"
            )


class Answers:
    """
    Samples the points of the front, by an engine that is made when something is left to sample.

    Args:
        args ([`EvaluateArguments`]):
            What to sample.
        config ([`MAVISValueConfig`]):
            Of the value model.
        prompts (`list`):
            Strings, or conversations.
    """

    def __init__(
        self, args: EvaluateArguments, config: MAVISValueConfig, prompts: Sequence[Any]
    ) -> None:
        self.args = args
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model_name_or_path)
        self.ends = end_tokens(args.model_name_or_path, self.tokenizer)
        self.tree_config = TreeConfig(
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_k=config.top_k,
        )
        self.prompt_ids = [
            self.tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]

    @functools.cached_property
    def sampler(self) -> Any:
        """Of `beta` 1, which weights are multiplied by."""
        args = self.args
        of = (args.model_name_or_path, self.tree_config, self.ends)
        if args.vllm_server_base_url:
            url = args.vllm_server_base_url
            return GuidedServerSampler(args.model_name_or_path, url, *of[1:])
        if args.use_vllm:
            longest = max(map(len, self.prompt_ids)) + args.max_completion_length
            try:
                return VLLMSampler(
                    *of,
                    max_model_len=longest,
                    value_models=[args.value_model],
                    init_kwargs=args.vllm_init_kwargs,  # type: ignore[arg-type]
                )
            except ModuleNotFoundError as error:
                raise Refused(str(error)) from error  # what to install, or to set
        return TransformersSampler(*of, value_models=[args.value_model])

    def respond(
        self, beta: float, prompts: Sequence[Any], weights: Mapping[str, float], seed: int
    ) -> list[Response]:
        """A response to every prompt."""
        count = len(prompts)
        pieces = self.sampler(
            self.prompt_ids,
            [self.args.max_completion_length] * count,
            [seed * count + i for i in range(count)],
            {name: beta * weight for name, weight in weights.items() if weight} or None,
        )
        texts = self.tokenizer.batch_decode([p.tokens for p in pieces], skip_special_tokens=True)
        known = not (weights and self.args.vllm_server_base_url)
        return [
            Response(
                text,
                piece.tokens,
                log_ratio=sum(piece.log_ratios) if known else None,
                kl=sum(piece.kls) if known else None,
            )
            for text, piece in zip(texts, pieces)
        ]


def check_arguments(args: EvaluateArguments, objectives: Sequence[str]) -> MAVISValueConfig:
    """
    The value model's configuration, which has the `objectives` that are weighed, as has the server
    if there is one. Raises `ValueError` if not.
    """
    config = load_config(args.value_model)
    if unknown := sorted(set(objectives) - set(config.objectives or ())):
        raise ValueError(
            f"reward_funcs: {unknown[0]!r} is no objective of {args.value_model!r}, which has "
            f"{config.objectives}"
        )
    if args.vllm_server_base_url:
        check_server(args.vllm_server_base_url, objectives, config)
    return config


def evaluate_value_model(
    args: EvaluateArguments,
    config: MAVISValueConfig,
    prompts: Sequence[Any],
    reward_funcs: Mapping[str, Any],
) -> list[Path]:
    """
    Answers prompts under a grid of weights, rewards the answers and reports the front.

    Args:
        args ([`EvaluateArguments`]):
            What to sample, and where to write.
        config ([`MAVISValueConfig`]):
            Of [`check_arguments`].
        prompts (`list`):
            Strings, or conversations.
        reward_funcs (`dict[str, Callable | str]`):
            A reward function, or reward model id, for every objective that is weighed.

    Returns:
        `list[Path]`: The files of the report. Raises [`Refused`] where nothing can be sampled.
    """
    objectives = list(reward_funcs)
    answers = Answers(args, config, prompts)
    # All that changes what is sampled, or what is known of it: others' responses are not reused.
    asked = {
        "base_model": args.model_name_or_path,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "top_k": config.top_k,
        "kl": args.vllm_server_base_url is None,
    }
    guided = {**asked, "value_model": guidance_fingerprint(args.value_model)}
    identities = [json.dumps(each, sort_keys=True) for each in (asked, guided)]
    policies = [
        Policy(
            "unguided",
            functools.partial(answers.respond, 0.0),
            weights=[{}],
            identity=identities[0],
        ),
        *(
            Policy("MAVIS", functools.partial(answers.respond, beta), beta, identity=identities[1])
            for beta in args.betas
        ),
    ]
    weights = [
        dict(zip(objectives, map(float, row)))
        for row in simplex_weights(len(objectives), args.weight_steps)
    ]
    points: list[Point] = sweep(
        policies,
        prompts,
        weights,
        reward_funcs,
        Path(args.output_dir) / "points",
        seeds=args.seeds,
    )
    pairs = [list(pair) for pair in itertools.combinations(objectives, 2)]
    result = evaluate(points, pairs if len(objectives) > 2 else [], against=None)
    result["parameters"] = {**guided, "value_model": args.value_model, "seeds": args.seeds}
    return write_report(result, Path(args.output_dir) / "front", introduction(args))


def introduction(args: EvaluateArguments) -> str:
    """What the tables are of."""
    kl = "unknown: a server does not tell it" if args.vllm_server_base_url else "exact"
    return (
        f"# Front of {args.value_model}\n\n"
        f"Base model {args.model_name_or_path}, {args.seeds} responses of at most "
        f"{args.max_completion_length} tokens to each prompt of {args.dataset_name}. Strength: "
        f"`beta`. KL to the base model over the candidates: {kl}.\n\n"
    )
