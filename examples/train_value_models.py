"""Trains a MAVIS value model on a dataset of prompts, driven by a YAML file or the command line.

    python examples/train_value_models.py --config examples/train_value_models.yaml

Reward functions are given as `name=module:function` or `name=model_id`; modules are also looked for
beside this file.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from trimtab.trainers import MAVISConfig, MAVISTrainer


@dataclass
class MAVISScriptArguments:
    """
    Arguments of this script.

    Args:
        dataset_name (`str`):
            Name of a dataset on the Hub, or path of a JSON file with a prompt in each line. A file
            may have a column `"split"`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on.
        reward_funcs (`list[str]`):
            Objectives, as `name=module:function` or `name=model_id`.
    """

    dataset_name: str = field(
        metadata={
            "help": "Name of a dataset on the Hub, or path of a JSON file with a prompt in each "
            "line. A file may have a column 'split'."
        }
    )
    reward_funcs: list[str] = field(
        metadata={"help": "Objectives, as `name=module:function` or `name=model_id`."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})


def load_prompts(script_args: MAVISScriptArguments) -> DatasetDict:
    """The dataset by split."""
    name = script_args.dataset_name
    if not name.endswith((".json", ".jsonl")):
        return load_dataset(name)
    rows = load_dataset("json", data_files=name, split="train")
    if "split" not in rows.column_names:
        return DatasetDict({script_args.dataset_train_split: rows})
    splits: dict[str, Dataset] = {
        split: rows.filter(lambda row, split=split: row["split"] == split).remove_columns("split")
        for split in rows.unique("split")
    }
    return DatasetDict(splits)


def load_reward_func(spec: str) -> tuple[str, Any]:
    """The name and the function or model id of `name=module:function` or `name=model_id`."""
    name, separator, target = spec.partition("=")
    if not separator or not name or not target:
        raise ValueError(f"reward_funcs takes name=module:function or name=model_id, got {spec!r}")
    module, separator, function = target.partition(":")
    if not separator:
        return name, target
    sys.path.insert(0, str(Path(__file__).parent))
    return name, getattr(importlib.import_module(module), function)


def main(
    script_args: MAVISScriptArguments, training_args: MAVISConfig, model_args: ModelConfig
) -> None:
    dataset = load_prompts(script_args)
    trainer = MAVISTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=dict(map(load_reward_func, script_args.reward_funcs)),
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset.get(script_args.dataset_test_split),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Value model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((MAVISScriptArguments, MAVISConfig, ModelConfig))
    main(*parser.parse_args_and_config())
