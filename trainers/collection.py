"""Where a trainer's trees come from: sampled by its sampler and rewarded, or of its datasets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from transformers.utils import logging

from .base_model import load_base_model, precision_of, vllm_source_of
from .data import check_log_probs, store_responses
from .files import write_json
from .fingerprints import guidance_fingerprint, identify, weights_fingerprint
from .ray_sampler import RaySampler
from .rewards import RewardLog
from .rollouts import collect_rollouts, read_rollouts, switch_policy
from .samplers import Sampler, ServerSampler, TransformersSampler, VLLMSampler, prompt_log_probs
from .sources import Sources, rollout_dir
from .trees import StoredTrees, TreeConfig

if TYPE_CHECKING:
    from trimtab.plugins.value_config import MAVISValueConfig

logger = logging.get_logger(__name__)

COMPLETIONS = 8  # of `log_completions`


@dataclass
class Collection:
    """
    Collects trees of responses into the trainer's `rollout_dir`, or reads those that are there.

    Args:
        args ([`MAVISConfig`]):
            Of the trainer.
        sources ([`Sources`]):
            Prompts, responses and reward functions, once they are read.
        tree_config ([`TreeConfig`]):
            Shape of the trees.
        value_config ([`~trimtab.plugins.MAVISValueConfig`]):
            With the fingerprints of base model and tokenizer.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer, whose processes share the work.
        log (`Callable[[dict[str, float]], None]`):
            Takes what reward functions log.
    """

    args: Any
    sources: Sources
    tree_config: TreeConfig
    value_config: MAVISValueConfig
    accelerator: Any
    log: Callable[[dict[str, float]], None]
    _sampler: Any = None
    _reward_ids: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the rollouts are."""
        return rollout_dir(self.args)

    def folders(self, name: str) -> list[Path]:
        """Where a dataset's trees are: sampled ones, and those of responses that are given."""
        folder = self.folder / name
        if not (self.sources.responses and self.sources.reward_funcs):
            return [folder]
        return [folder, folder.with_name(f"{name}-responses")]

    def policy_folder(self, iteration: int, objective: str, name: str) -> Path:
        """Where trees of a dataset are that were sampled from an objective's policy."""
        return self.folder / f"iteration-{iteration}" / objective / name

    @functools.cached_property
    def base_weights(self) -> str:
        """Fingerprint of the base model's weights."""
        return weights_fingerprint(self.sources.base_model, self.args.model_init_kwargs)

    def of_base_model(self, state: Any) -> dict[str, StoredTrees]:
        """
        Trees of every dataset, by its name: of the base model's responses, and of its own.

        Args:
            state ([`~transformers.TrainerState`]):
                Of the trainer, for reward functions.
        """
        sources = self.sources
        # Asked once: what a function keeps from its calls is no part of it.
        self._reward_ids = {name: identify(func) for name, func in sources.reward_funcs.items()}
        with self._sampling():
            trees = dict.fromkeys(sources.prompts, StoredTrees([]))
            for name in trees:
                if sources.reward_funcs:
                    trees[name] += self.collect(name, state)
                if sources.responses:
                    trees[name] += self._store(name)
        for responses in sources.responses.values():
            if responses.references:
                model: Any = load_base_model(self.sources.base_model, self.args)
                check_log_probs(responses, model.to(self.args.device))
        if sources.responses and not sources.on_policy:
            logger.warning(
                "the responses are those of `train_dataset`, which need not be the base model's: "
                "values are of what wrote them, and KL efficiency on such held-out responses is "
                "the squared gain by two nats for the base model's own responses alone"
            )
        return trees

    def of_policies(
        self, names: Iterable[str], state: Any, iteration: int, value_model: Path
    ) -> dict[str, dict[str, StoredTrees]]:
        """Trees of these datasets, by objective, of the policies that a value model guides."""
        with self._sampling():
            return {
                name: {
                    objective: self.collect(name, state, objective, iteration, value_model)
                    for objective in self.sources.objectives
                }
                for name in names
            }

    def collect(
        self,
        name: str,
        state: Any,
        objective: str | None = None,
        iteration: int = 0,
        value_model: Path | None = None,
    ) -> StoredTrees:
        """The rollouts of a dataset under the base model, or the policy of one objective."""
        args, dataset = self.args, self.sources.prompts[name]
        folder, reward_funcs, weights = self.folder / name, self.sources.reward_funcs, None
        identity: dict[str, Any] = {
            "base_model": self.sources.base_model,
            "base_model_fingerprint": self.value_config.base_model_fingerprint,
            "base_model_weights": self.base_weights,
            "tokenizer_fingerprint": self.value_config.tokenizer_fingerprint,
            "eos_token_ids": sorted(self.sources.eos_token_ids),
            "sampler": "vllm" if args.use_vllm or args.vllm_server_base_url else "transformers",
            "precision": precision_of(
                args.vllm_init_kwargs if args.use_vllm else args.model_init_kwargs
            ),
        }
        if objective is not None and value_model is not None:
            weights = {objective: 1.0}
            folder = self.policy_folder(iteration, objective, name)
            guide = guidance_fingerprint(value_model)
            identity |= {"weights": weights, "beta": args.beta, "value_model": guide}
            reward_funcs = {objective: reward_funcs[objective]}
            if args.rollout_dir is None and self.accelerator.is_main_process:
                switch_policy(folder, guide)
            self.accelerator.wait_for_everyone()

        def make_sampler() -> Sampler:
            sampler = self.make_sampler(value_model)
            return functools.partial(sampler, weights=weights) if weights else sampler

        log = RewardLog(state)
        collect_rollouts(
            folder,
            prompts=list(dataset["prompt"]),
            columns={c: list(dataset[c]) for c in dataset.column_names if c != "prompt"},
            tokenizer=self.sources.tokenizer,
            prompt_ids=self.sources.prompt_ids[name],
            reward_funcs=reward_funcs,
            config=self.tree_config,
            eos_token_ids=self.sources.eos_token_ids,
            make_sampler=make_sampler,
            identity=identity,
            batch_size=args.rollout_batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            reward_ids=self._reward_ids,
            reward_log=log,
        )
        self.accelerator.wait_for_everyone()
        trees: StoredTrees = read_rollouts(folder)
        self._report(name, trees, log)
        return trees

    def _store(self, name: str) -> StoredTrees:
        """The trees of a dataset's own responses."""
        folder, responses = self.folders(name)[-1], self.sources.responses[name]
        if self.accelerator.is_main_process:
            base_model = self.sources.base_model
            store_responses(folder, responses, self.args.rollout_batch_size, base_model)
        self.accelerator.wait_for_everyone()
        trees: StoredTrees = read_rollouts(folder)
        responses.trees = trees  # no longer in memory
        return trees

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Closes the sampler, if one was needed."""
        try:
            yield
        finally:
            if self._sampler is not None:
                self._sampler.close()
                self._sampler = None

    def make_sampler(self, value_model: Path | None = None) -> Sampler:
        """The sampler of the base model, or of the policies of a value model, made once."""
        if self._sampler is not None:
            return self._sampler
        args = self.args
        value_models = [] if value_model is None else [str(value_model)]
        base_model, config = self.sources.base_model, self.tree_config
        ends = self.sources.eos_token_ids
        if args.vllm_server_base_url:
            self._sampler = ServerSampler(
                base_model, args.vllm_server_base_url, config, ends, self._server_reference()
            )
        elif args.use_vllm:
            if self.accelerator.num_processes > 1:
                raise ValueError(
                    "`use_vllm` samples in a single process: call `collect_rollouts` without a "
                    "launcher first, then launch the training, which finds them stored; or start "
                    "`vllm serve` and set `vllm_server_base_url`"
                )
            make: Any = VLLMSampler
            if args.num_ray_workers:
                make = functools.partial(
                    RaySampler, args.num_ray_workers, model_init_kwargs=args.model_init_kwargs
                )
            self._sampler = make(
                model=base_model,
                config=config,
                eos_token_ids=ends,
                max_model_len=self.sources.longest,
                value_models=value_models,
                beta=args.beta,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                init_kwargs={**vllm_source_of(args), **(args.vllm_init_kwargs or {})},
            )
        else:
            self._sampler = TransformersSampler(
                base_model,
                config,
                ends,
                value_models=value_models,
                beta=args.beta,
                batch_size=args.generation_batch_size,
                model_init_kwargs=args.model_init_kwargs,
            )
        return self._sampler

    def _server_reference(self) -> tuple[list[int], list[float]]:
        """Tokens of the prompts and their log-probabilities under the base model, kept on disk."""
        prompts = self.sources.prompt_ids["train"]
        longest = max(map(len, prompts)) + self.args.max_completion_length - 1  # a server takes it
        tokens = list(chain(*prompts))[: min(256, longest)]
        path = self.folder / "server_reference.json"
        made_of = {"base_model_weights": self.base_weights, "tokens": tokens}
        found = json.loads(path.read_text()) if path.exists() else {}
        if {name: found.get(name) for name in made_of} != made_of:
            model: Any = load_base_model(self.sources.base_model, self.args)
            found = {**made_of, "log_probs": prompt_log_probs(model.to(self.args.device), tokens)}
            del model
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        return tokens, found["log_probs"]

    def _report(self, name: str, trees: StoredTrees, log: RewardLog) -> None:
        """Logs what reward functions have logged, and a sample of the responses if asked to."""
        logged: dict[str, list[float]] = {}
        for of_process in gather_object([dict(log.metrics)]):
            for metric, values in of_process.items():
                logged.setdefault(metric, []).extend(values)
        if logged:
            prefix = "" if name == "train" else f"{name}_"
            self.log({prefix + metric: float(np.mean(x)) for metric, x in logged.items()})
        if not (self.args.log_completions and self.accelerator.is_main_process):
            return
        from trl.trainer.utils import print_prompt_completions_sample

        drawn = np.random.default_rng(self.args.seed).permutation(len(trees))[:COMPLETIONS]
        sample = [(trees[i], trees[i].leaves()[0]) for i in drawn]
        print_prompt_completions_sample(
            [self.sources.prompts[name][tree.prompt_index]["prompt"] for tree, _ in sample],
            self.sources.tokenizer.batch_decode(
                [tree.response(leaf) for tree, leaf in sample], skip_special_tokens=True
            ),
            {
                objective: [tree.rewards[objective][leaf] for tree, leaf in sample]
                for objective in trees[0].rewards
            },
            None,
            log.trainer_state.global_step,
            extra={
                column: [found.get((tree.prompt_index, leaf), "") for tree, leaf in sample]
                for column, found in log.by_response.items()
            },
        )
