"""`trimtab train`, `rollouts` and `evaluate`: a [`MAVISTrainer`], or the front of what it has made,
from flags and a YAML file.

What is heavy is imported once the arguments are read: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.plugins.cli import bad_input

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .mavis_trainer import MAVISTrainer

TRAIN_HELP = """usage: trimtab {command} [--config FILE.yaml] [--KEY VALUE ...]

{does}
A flag overrides the same key of the YAML file. The main ones:

  model_name_or_path    base model, a folder or hub id; or a value model to train on
  dataset_name          file of prompts (.jsonl, .json, .parquet), or a dataset's hub id
  reward_funcs          NAME=MODULE:FUNCTION or NAME=MODEL_ID, one or more; modules are looked
                        for in the working directory and beside the YAML file. Without any,
                        the dataset is of responses with scores, of steps or of pairs
  output_dir            where the value model, its checkpoints and the rollouts go
  use_vllm              sample with vLLM in this process (vllm_server_base_url: elsewhere)
  max_completion_length tokens of a response
  layers, children      shape of the trees of responses
  num_train_epochs, learning_rate, per_device_train_batch_size, report_to, ...
                        those of transformers' TrainingArguments
  use_peft              train an adapter (lora_r, ...: those of TRL's ModelConfig)

`trimtab {command} --help-all` lists all, and the docstring of MAVISConfig explains ours.
"""
DOES = {
    "train": "Trains a value model: samples responses to the prompts, rewards them, learns.",
    "rollouts collect": "Samples and rewards what `trimtab train` would learn from, and keeps it.",
    "rollouts score": "Rewards stored rollouts by new or changed reward functions; samples none.",
}
ROLLOUTS_HELP = """usage: trimtab rollouts collect|score|show ...

  collect   {collect}
  score     {score}
  show      what a folder of rollouts holds: trimtab rollouts show FOLDER

collect and score take the keys of `trimtab train`, from flags and the same YAML file.
"""
EVALUATE_HELP = """usage: trimtab evaluate MODEL VALUE_MODEL [--config FILE.yaml] [--KEY VALUE ...]

Answers prompts under a grid of weights, rewards the answers, and reports the front: front.json,
.md, .png and .html in output_dir. An interrupted run goes on where it stopped.
A flag overrides the same key of the YAML file.

  dataset_name          file of prompts (.jsonl, .json, .parquet), or a dataset's hub id; its
                        split "test" is answered (dataset_test_split), a file without any whole
  reward_funcs          NAME=MODULE:FUNCTION or NAME=MODEL_ID, of the objectives to weigh
  output_dir            where the responses and the report go
  betas                 strengths of the guidance (4)
  weight_steps          parts that a weight of 1 is dealt out in: the grid (4)
  seeds                 responses to each prompt (2)
  max_completion_length tokens of a response (256)
  use_vllm              false: sample with transformers, not with vLLM in this process
  vllm_server_base_url  sample from a server that guides by VALUE_MODEL; the KL is then unknown

`trimtab evaluate --help-all` lists all.
"""
# Keys of TRL's GRPO, and what takes their place
INSTEAD = {
    "num_generations": "`root_children`, `children` and `layers` say how many responses there are",
    "num_generations_eval": "the trees of `eval_dataset` have the shape of all others",
    "vllm_mode": "`use_vllm` samples in this process, `vllm_server_base_url` elsewhere",
    "vllm_server_host": "`vllm_server_base_url`",
    "vllm_server_port": "`vllm_server_base_url`",
    "reward_weights": "weights are chosen by every request to the served value model",
    "reward_model_name_or_path": "`reward_funcs: [NAME=MODEL_ID]`",
    "trust_remote_code": "`model_init_kwargs: {trust_remote_code: true}`",
    "generation_kwargs": "`temperature` and `top_k`: guidance needs to know what is sampled from",
}
# Of TRL's ModelConfig, and what `from_pretrained` calls them
MODEL_KEYS = {
    "model_revision": "revision",
    "dtype": "dtype",
    "attn_implementation": "attn_implementation",
}
MEAN_OTHERS = {
    "beta": "the strength of the guidance that later iterations sample with, no KL coefficient",
    "num_iterations": "how often all is sampled and trained anew, not the uses of a batch",
}


@dataclass
class MAVISScriptArguments:
    """
    Arguments of `trimtab train` beside those of [`MAVISConfig`] and [`~trl.ModelConfig`].

    Args:
        dataset_name (`str`):
            Name of a dataset on the Hub, or path of a JSON or Parquet file with a prompt in each
            row. A file may have a column `"split"`.
        reward_funcs (`list[str]`, *optional*):
            Objectives, as `name=module:function` or `name=model_id`. Without any, the dataset is of
            responses with their scores, of steps or of pairs, and nothing is sampled.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on.
    """

    dataset_name: str = field(
        metadata={
            "help": "Name of a dataset on the Hub, or path of a JSON or Parquet file with a prompt "
            "in each row. A file may have a column 'split'."
        }
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Objectives, as `name=module:function` or `name=model_id`. Without any, the "
            "dataset is of responses with their scores, of steps or of pairs, and nothing is "
            "sampled."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})


def load_prompts(script_args: Any, needed: str = "dataset_train_split") -> DatasetDict:
    """The dataset by split, of which the one that the argument `needed` names is there."""
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    name, needed_split = script_args.dataset_name, getattr(script_args, needed)
    formats = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if (suffix := Path(name).suffix) not in formats:
        dataset = load_dataset(name)
    elif not Path(name).is_file():
        raise FileNotFoundError(f"dataset_name: there is no file {name!r} in {os.getcwd()}")
    else:
        try:
            rows = load_dataset(formats[suffix], data_files=name, split="train")
        except DatasetGenerationError as error:
            raise ValueError(
                f"dataset_name: {name!r} cannot be read, {error.__cause__ or error}"
            ) from error
        dataset = DatasetDict({needed_split: rows})
        if "split" in rows.column_names:
            dataset = DatasetDict(
                {
                    split: rows.filter(
                        lambda row, split=split: row["split"] == split
                    ).remove_columns("split")
                    for split in rows.unique("split")
                }
            )
    if needed_split not in dataset:
        raise ValueError(
            f"{needed}: {name!r} has no split {needed_split!r}, it has {list(dataset)}"
        )
    return dataset


def load_reward_func(spec: str, folders: Sequence[str | Path] = (".",)) -> tuple[str, Any]:
    """
    The name and the function or model id of `name=module:function` or `name=model_id`.

    Args:
        spec (`str`):
            What was given.
        folders (`list` of `str` or `Path`, *optional*, defaults to the working directory):
            Where modules are looked for first.
    """
    name, separator, target = spec.partition("=")
    if not separator or not name or not target:
        raise ValueError(f"reward_funcs takes name=module:function or name=model_id, got {spec!r}")
    module, separator, function = target.partition(":")
    if not separator:
        return name, target
    for folder in reversed([str(Path(each).resolve()) for each in folders]):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        return name, getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise  # one that the module itself needs
        raise ValueError(
            f"reward_funcs: the module of {spec!r} is neither in {os.getcwd()} nor beside the "
            "YAML file, nor installed"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"reward_funcs: the module {module!r} has no {function!r}, asked for by {spec!r}"
        ) from error


def parse(command: str, arguments: Sequence[str], kinds: Any = None) -> tuple[Any, ...]:
    """
    The arguments of a run, from flags and the YAML file that `--config` names.

    Args:
        command (`str`):
            Subcommand, for the messages.
        arguments (`list[str]`):
            Of the subcommand.
        kinds (`tuple[type, ...]`, *optional*):
            Dataclasses of arguments, by default [`MAVISScriptArguments`], [`MAVISConfig`] and
            [`~trl.ModelConfig`].

    Returns:
        `tuple`: One of each of `kinds`, and the folder of the YAML file, the working directory if
        there is none.
    """
    import yaml
    from trl import ModelConfig, TrlParser

    from .mavis_config import MAVISConfig

    kinds = kinds or (MAVISScriptArguments, MAVISConfig, ModelConfig)
    parser = TrlParser(
        kinds,
        prog=f"trimtab {command}",
        usage=f"trimtab {command} [--config FILE.yaml] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    if ModelConfig in kinds:
        parser.set_defaults(dtype=None)  # the checkpoint's own, unless it is given
    if "--help-all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    arguments = [part for a in arguments for part in _flag_and_value(a)]
    folder = Path()
    if "--config" in arguments[:-1]:
        folder = Path(arguments[arguments.index("--config") + 1]).parent
    try:
        *parsed, of_config, of_flags = parser.parse_args_and_config(
            list(arguments), return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"--config: it is no YAML, {error}") from error
    if of_config or of_flags:
        keys = [key.removeprefix("--") for key in of_config[::2]]
        keys += [flag.removeprefix("--") for flag in of_flags if flag.startswith("--")]
        raise ValueError(unknown_keys(command, keys or of_flags))
    return (*parsed, folder)


def _flag_and_value(argument: str) -> list[str]:
    """`--config=FILE` as two: TRL looks for the flag alone."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def unknown_keys(command: str, keys: Sequence[str]) -> str:
    """What to say of keys that there are not, and of what a GRPO configuration meant by others."""
    from trl import GRPOConfig

    lines = [
        f"unknown keys {', '.join(keys)}: take them out, or see `trimtab {command} --help-all`"
    ]
    lines += [f"  {key}: instead, {INSTEAD[key]}" for key in keys if key in INSTEAD]
    if {f.name for f in fields(GRPOConfig)} & set(keys):
        lines += [f"  {key}, if it is there, is {meaning}" for key, meaning in MEAN_OTHERS.items()]
    return "\n".join(lines)


def make_trainer(command: str, arguments: Sequence[str]) -> tuple[MAVISTrainer, Any]:
    """The trainer that flags and a YAML file describe, and its [`MAVISScriptArguments`]."""
    from trl import get_peft_config

    from .mavis_trainer import MAVISTrainer

    script_args, training_args, model_args, folder = parse(command, arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: give the base model's folder or hub id")
    if model_args.load_in_8bit or model_args.load_in_4bit:
        raise ValueError(
            "load_in_8bit, load_in_4bit: value models are cut from, and read, the base model as it "
            "is served; give a checkpoint that is quantised"
        )
    of_model = {
        key: getattr(model_args, name)
        for name, key in MODEL_KEYS.items()
        if getattr(model_args, name) not in (None, "main")
    }
    if of_model:
        training_args.model_init_kwargs = {**of_model, **(training_args.model_init_kwargs or {})}
    dataset = load_prompts(script_args)
    specs = script_args.reward_funcs
    reward_funcs = [load_reward_func(spec, (".", folder)) for spec in specs or ()]
    trainer = MAVISTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=None if specs is None else dict(reward_funcs),
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset.get(script_args.dataset_test_split),
        peft_config=get_peft_config(model_args),
    )
    return trainer, script_args


def train(arguments: list[str]) -> int:
    """Trains a value model and saves it in `output_dir`."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRAIN_HELP.format(command="train", does=DOES["train"]), end="")
        return 0
    with bad_input("train"):
        trainer, script_args = make_trainer("train", arguments)
    trainer.train()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    folder = trainer.args.output_dir
    trainer.save_model(folder)
    trainer.accelerator.print(f"Value model saved to {folder}: `trimtab inspect {folder}`")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Reports the front of a value model's objectives."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(EVALUATE_HELP, end="")
        return 0
    with bad_input("evaluate"):
        from .evaluation.command import (
            EvaluateArguments,
            Refused,
            check_arguments,
            evaluate_value_model,
        )

        models = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
        if len(models) not in (0, 2):
            raise ValueError(f"give MODEL and VALUE_MODEL before all flags, got {models}")
        named = chain(*zip(("--model_name_or_path", "--value_model"), models))
        args, folder = parse("evaluate", [*named, *arguments[len(models) :]], (EvaluateArguments,))
        rows = load_prompts(args, "dataset_test_split")[args.dataset_test_split]
        if "prompt" not in rows.column_names:
            raise ValueError(
                f"dataset_name: {args.dataset_name!r} has no column 'prompt', it has "
                f"{rows.column_names}"
            )
        reward_funcs = dict(load_reward_func(spec, (".", folder)) for spec in args.reward_funcs)
        config = check_arguments(args, list(reward_funcs))
    try:
        files = evaluate_value_model(args, config, list(rows["prompt"]), reward_funcs)
    except Refused:
        with bad_input("evaluate"):
            raise
    print(*files, sep="\n")
    return 0


def rollouts(arguments: list[str]) -> int:
    """Collects, scores or shows rollouts."""
    action = arguments[0] if arguments else "--help"
    if action in ("-h", "--help"):
        shown = {name.split()[-1]: does for name, does in DOES.items()}
        print(ROLLOUTS_HELP.format(**shown), end="")
        return 0
    if action == "show":
        return show(arguments[1:])
    command, rest = f"rollouts {action}", arguments[1:]
    if command not in DOES:
        with bad_input("rollouts"):
            raise ValueError(f"no action {action!r}, give one of collect, score, show")
    if not rest or {"-h", "--help"} & set(rest):
        print(TRAIN_HELP.format(command=command, does=DOES[command]), end="")
        return 0
    with bad_input(command):
        trainer: Any = make_trainer(command, rest)[0]
    if action == "score":
        trainer._collection.make_sampler = _refuse_to_sample
    trainer.collect_rollouts()
    trainer.accelerator.print(f"Rollouts in {trainer._collection.folder}: `trimtab rollouts show`")
    return 0


def _refuse_to_sample(value_model: Any = None) -> Any:
    with bad_input("rollouts score"):
        raise ValueError(
            "there are prompts without rollouts: `trimtab rollouts collect` samples them"
        )


def show(arguments: list[str]) -> int:
    """Prints what a folder of rollouts holds."""
    parser = argparse.ArgumentParser(
        prog="trimtab rollouts show",
        description="What a folder of rollouts holds: its size, every objective's rewards, and "
        "the best and the worst response to some prompts.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="for example value_model/rollouts/train")
    parser.add_argument("--prompts", type=int, default=1, help="number of prompts to show")
    options = parser.parse_args(arguments)
    from .rollouts import read_rollouts

    folder = Path(options.folder)
    with bad_input("rollouts show"):
        trees = read_rollouts(folder)
        if not trees:
            below = sorted({str(path.parent) for path in folder.glob("**/trees-*.parquet")})
            hint = f"give one of {', '.join(below)}" if below else "it is where they are collected"
            raise ValueError(f"FOLDER {options.folder!r} holds no rollouts: {hint}")
        print("\n".join(summary(folder, trees, options.prompts)))
    return 0


def summary(folder: Path, trees: Sequence[Any], prompts: int) -> list[str]:
    """Lines about rollouts."""
    import numpy as np
    from transformers import AutoTokenizer

    from .responses import SOURCE
    from .rewards import reward_statistics

    made = json.loads((folder / "rollouts.json").read_text())
    responses = sum(len(tree.leaves()) for tree in trees)
    tokens = sum(len(node.tokens) for tree in trees for node in tree.nodes[1:])
    lines = [
        f"{len(trees)} prompts, {responses} responses, {tokens} tokens "
        f"{'given as data for' if made.get('source') == SOURCE else 'sampled from'} "
        f"{made['base_model']}",
    ]
    objectives = [name for name in trees[0].rewards if all(name in tree.rewards for tree in trees)]
    for name in objectives:
        rewards = np.concatenate([tree.rewards[name] for tree in trees])
        known = int((~np.isnan(rewards)).sum())
        if not known:
            lines.append(f"{name}: no reward of any response")
            continue
        (mean,), (std,) = reward_statistics(trees, [name])
        lines.append(
            f"{name}: mean {mean:.4g}, standard deviation within a prompt {std:.4g}, from "
            f"{np.nanmin(rewards):.4g} to {np.nanmax(rewards):.4g}, of {known} responses"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(made["base_model"])
    for tree in trees[:prompts]:
        lines += ["", f"prompt {tree.prompt_index}: {tokenizer.decode(tree.nodes[0].tokens)!r}"]
        for name in objectives:
            leaves = [i for i in tree.leaves() if not np.isnan(tree.rewards[name][i])]
            leaves.sort(key=lambda i: tree.rewards[name][i])
            for leaf in dict.fromkeys((*leaves[-1:], *leaves[:1])):
                text = tokenizer.decode(tree.response(leaf), skip_special_tokens=True)
                lines.append(f"  {name} {tree.rewards[name][leaf]:.4g}: {text!r}")
    return lines
