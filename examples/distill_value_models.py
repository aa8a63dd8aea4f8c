"""Distils MAVIS value models into one with a cheaper head, driven by a YAML file.

    python examples/distill_value_models.py --config examples/distill_value_models.yaml

Several teachers, of an objective each, make one student of them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, TrlParser

from trimtab.trainers import MAVISDistillationConfig, MAVISDistillationTrainer


@dataclass
class MAVISDistillationScriptArguments:
    """
    Arguments of this script.

    Args:
        teachers (`list[str]`):
            Ids or paths of the value models to learn from.
        rollout_dir (`str`):
            Folder of the rollouts that `train_value_models.py` stored. Those in `"train"` are
            trained on, those in `"eval"`, if there are any, are evaluated on.
    """

    teachers: list[str] = field(
        metadata={"help": "Ids or paths of the value models to learn from."}
    )
    rollout_dir: str = field(
        metadata={
            "help": "Folder of the rollouts that `train_value_models.py` stored. Those in 'train' "
            "are trained on, those in 'eval', if there are any, are evaluated on."
        }
    )


def main(
    script_args: MAVISDistillationScriptArguments,
    training_args: MAVISDistillationConfig,
    model_args: ModelConfig,
) -> None:
    rollouts = Path(script_args.rollout_dir)
    trainer = MAVISDistillationTrainer(
        model=model_args.model_name_or_path,
        teachers=script_args.teachers,
        args=training_args,
        train_dataset=rollouts / "train",
        eval_dataset=rollouts / "eval" if (rollouts / "eval").is_dir() else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Value model saved to {training_args.output_dir}.")


if __name__ == "__main__":
    parser = TrlParser((MAVISDistillationScriptArguments, MAVISDistillationConfig, ModelConfig))
    main(*parser.parse_args_and_config())
