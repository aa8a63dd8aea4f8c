"""The trainer of MAVIS value models: collects rollouts, then regresses values on them.

Here is what [`~transformers.Trainer`] calls or is called for; checkpoints, logging, distribution
and the hub are its own. What is learnt from is in `sources`, its trees in `collection`, what is
trained in `starting_model`, how in `head_training` and `state_training`, the order of it all in
`iterations` and how a run is resumed in `run_state`.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trimtab.plugins.cards import model_card
from trimtab.plugins.value_model import MAVISValueModel

from .base_model import end_tokens, load_base_model, source_of
from .collection import Collection
from .data import as_given
from .files import write_json
from .head_training import HeadTraining, joined_config, joined_heads
from .iterations import Iterations
from .mavis_config import MAVISConfig
from .run_state import INPUTS
from .sources import Sources
from .starting_model import (
    arguments_for,
    context_of,
    read_model,
    read_weights_in_every_process,
    starting_model,
)
from .state_training import StateTraining, refuse_data_parallel
from .trees import TreeConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class MAVISTrainer(Trainer):
    """
    Trainer for the value models of MAVIS (multi-objective alignment by value-guided decoding,
    [arXiv 2508.13415](https://huggingface.co/papers/2508.13415)).

    [`~MAVISTrainer.train`] samples a tree of responses to every prompt from the base model, rewards
    the finished ones, and trains one model to predict, after every token of a response, the mean
    standardised reward of each objective. Rollouts are stored as they come: call it again after an
    interruption and it goes on where it was.

    With `num_iterations` above 1 the next iteration samples from the policy that the values of the
    last one guide, a tree for every objective and prompt, charges the KL to the base model, and
    learns from all rollouts so far. Values guide with the scale that the base model's responses to
    `eval_dataset` bear out (`candidate_scale` of [`~trimtab.plugins.MAVISValueConfig`]).

    This class is a wrapper around the [`~transformers.Trainer`] class and inherits all of its
    attributes and methods.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trimtab.trainers import MAVISConfig, MAVISTrainer

    >>> def brevity(completions, **kwargs):
    ...     return [-float(len(completion)) for completion in completions]

    >>> prompts = Dataset.from_dict({"prompt": [f"Tell me about {n}" for n in range(20)]})
    >>> trainer = MAVISTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=MAVISConfig(output_dir="value-model", max_completion_length=32, layers=2),
    ...     reward_funcs={"brevity": brevity},
    ...     train_dataset=prompts.select(range(16)),
    ...     eval_dataset=prompts.select(range(16, 20)),
    ... )
    >>> trainer.collect_rollouts()  # `train` does it, too
    >>> trainer.train()
    >>> trainer.save_model()
    >>> efficiency = trainer.evaluate()["eval_kl_efficiency/brevity"]
    ```

    Args:
        model (`str` or [`~trimtab.plugins.MAVISValueModel`]):
            Model to be trained. Can be either:

            - A string, being the id or path of the *base model* to guide. A value model is made
              for it, of the kind that `args.head_type` names.
            - A value model, or the folder of one, whose `base_model` is sampled from and whose
              objectives are those of `reward_funcs` or of the dataset's columns. If none of these
              are its objectives, they are added to it, with `head_type="hidden"`: what is there
              stays bit-identical, and the new heads read the features of those that are there.
              `trainer.model` then has the new heads, and `save_model` writes all.
        args ([`MAVISConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        reward_funcs (`dict[str, Callable | str | PreTrainedModel]`, or a `list` of these, or one):
            A reward function for each objective: a callable, plain or `async`, with the signature
            of GRPO's, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`,
            or the id of a sequence classification model. It gets `trainer_state`, `log_metric` and
            `log_extra`, too, if it takes them. `None` is "not applicable": the response
            is left out of this objective's statistics, values, losses and measures. `None` in the
            place of a function: the objective's scores are in the dataset, in the column of its
            name, those of the responses there. Without names, as in TRL, an objective is named by
            its function's `__name__`, or by the last part of its model's id.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of prompts, with a column `"prompt"` of strings (standard) or lists of messages
            (conversational). Other columns are passed to the reward functions, and a column
            `"tools"` of JSON schemas to the chat template, too.

            Without `reward_funcs`, a dataset of responses that were scored before, and nothing is
            sampled: TRL's prompt-completion type, with a column `"completion"`, and a column of
            numbers for each objective, named as it, in which `None` or NaN is a score that is not
            known. All such columns are objectives: with the column `"label"` of TRL's unpaired
            preference type it is that one. Remove the others, such as an id. A response that does
            not end gets an end-of-sequence token. One longer than `args.max_completion_length` is
            cut, and its first tokens are learnt from with the score of the whole response.

            Or TRL's stepwise supervision type: `"completions"`, the steps of a response as a list
            of strings, and `"labels"`, a number or truth value for each, what is known of the value
            at its end, or `None`. The objective is named `"labels"`; a step's tokens learn its
            label, and those of a step without one the next label of the response.

            With both, `reward_funcs={"brief": brief, "helpful": None}`, each objective learns from
            its own source: "helpful" from the responses in the dataset, "brief" from those that are
            sampled to each of its prompts, once. A row's response may be `None`.

            Or, without `reward_funcs`, TRL's preference type: `"chosen"` and `"rejected"`, with
            their prompt in a column or in both, and optionally `"margin"`, in log-odds. The
            objective is named `"preference"`. Its values are in standard deviations of the noise of
            a judgement, `pi / sqrt(6)` log-odds: see [`~trimtab.trainers.preferences`].
        eval_dataset ([`~datasets.Dataset`], or `dict` of names to these, *optional*):
            Dataset of prompts to evaluate on, with its own rollouts, sampled once. With several
            iterations it also scales the values and measures the policies. Without `reward_funcs`,
            responses with the same columns. Of several by name, the metrics of each are
            `eval_<name>_...`, and all of them choose and scale.

            Datasets that are streamed are read to their end, into Parquet files beside the
            rollouts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The base model's tokenizer. If `None`, it is loaded with
            [`~transformers.AutoTokenizer.from_pretrained`].
        reward_processing_classes (`list`, or `dict[str, PreTrainedTokenizerBase]`, *optional*):
            Tokenizers of the reward models, in the order of `reward_funcs` or by objective. If
            `None`, they are loaded with the models' names.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the backbone; the head is trained in full. Checkpoints
            hold the adapter, [`~MAVISTrainer.save_model`] writes the merged model unless
            `args.merge_adapter` is `False`.

    Raises:
        TypeError: `model` or `args` is of another kind.
        ValueError: The arguments, the datasets or the reward functions do not fit together.
    """

    loss_is_scaled_for_ga = False

    # Wider in `Trainer`
    args: Any
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any

    value_config: Any  # of the model that is trained
    base_model: str
    _metrics: dict[str, Any]  # by mode
    _prefix = "eval"  # of the metrics

    def __init__(
        self,
        model: str | MAVISValueModel,
        args: MAVISConfig | None = None,
        reward_funcs: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None
        ] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        read_weights_in_every_process()
        given: Any = read_model(model, args)
        base_model: str = given if isinstance(given, str) else given.config.base_model
        self.base_model = base_model
        args = arguments_for(given, args)
        if args.num_iterations > 1 and optimizers != (None, None):
            raise ValueError(
                "`optimizers` serve one training: give them with num_iterations=1, or choose them "
                "with `optim` and `lr_scheduler_type`, which every iteration makes anew"
            )
        known = [] if isinstance(given, str) else list(given.config.objectives or [])
        self._sources = Sources(
            args,
            base_model,
            reward_funcs,
            reward_processing_classes,
            train_dataset,
            eval_dataset,
            known,
        )
        self.reward_funcs, self.objectives = self._sources.reward_funcs, self._sources.objectives
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base_model, **source_of(args))
        shape = {f.name: getattr(args, f.name) for f in dataclasses.fields(TreeConfig)}
        self.tree_config = TreeConfig(**shape)

        set_seed(args.seed)
        value_model = starting_model(given, args, self.objectives, processing_class)
        # A value model that objectives are added to
        self._kept: Any = None if given is value_model or isinstance(given, str) else given
        self.value_config = value_model.config
        revision = source_of(args).get("revision", "main")
        self.eos_token_ids = end_tokens(base_model, processing_class, revision)
        context = context_of(value_model.config, base_model, args)
        self._sources.read(processing_class, self.eos_token_ids, context)
        hidden = self.value_config.head_type == "hidden"
        self._training: Any = HeadTraining(self) if hidden else StateTraining(self)
        value_model, collator = self._training.prepare(value_model, args, peft_config)
        super().__init__(
            model=value_model,
            args=args,
            data_collator=collator,
            train_dataset=self._sources.sets["train"],
            eval_dataset=as_given(self._sources.sets),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_data_parallel(args)
        # Evaluation computes the loss only if both are set.
        self.can_return_loss = True
        self.label_names = []
        if isinstance(self._training, TrainerCallback):
            self.add_callback(self._training)
        self._metrics = {x: self._training.metrics(self.objectives) for x in ("train", "eval")}
        self._collection = Collection(
            args, self._sources, self.tree_config, self.value_config, self.accelerator, self.log
        )
        self._iterations = Iterations(self)

    def collect_rollouts(self) -> None:
        """
        Samples and rewards what is missing of the base model's rollouts, or stores the responses
        of the dataset, and packs them for training.

        [`~MAVISTrainer.train`] and [`~MAVISTrainer.evaluate`] call it; a second call does nothing.

        Raises:
            ValueError: Rollouts that are there were made otherwise, or a reward function does not
                return a finite number or `None` for each response.
            RuntimeError: A reward function raises. What was sampled is kept.
        """
        self._iterations.collect()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Collects the rollouts, trains on them and measures the model's `candidate_range`; with
        `num_iterations` above 1 again and again, and keeps the iteration whose policies have the
        highest mean `reward - KL / beta` on every second prompt of `eval_dataset`; the measures
        are those on the others.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                If `True`, goes on with the last complete checkpoint, in the iteration that it is
                of; if there is none yet, with the rollouts that were collected. It must have been
                made from the same rollouts, rewards, base model and arguments. With one iteration
                it may be the path of a checkpoint. Without it, that of `args` counts; without
                either, the model is trained anew.
            args, kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`] of the last iteration that was trained;
            `None` if `resume_from_checkpoint` found all of them finished.

        Raises:
            ValueError: The checkpoint was made from something else, or is named with several
                iterations.
        """
        several = self.args.num_iterations > 1
        resume = resume_from_checkpoint
        if resume is None:
            resume = self.args.resume_from_checkpoint
            # The field is text: that of a flag, or a path
            resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
        if several and isinstance(resume, str):
            raise ValueError(
                "`resume_from_checkpoint` must be True with several iterations: it finds the "
                f"iteration itself; got {resume!r}"
            )
        self.collect_rollouts()
        return self._iterations.train(resume, *args, **kwargs)

    @property
    def on_policy(self) -> bool:
        """Whether what is learnt from was sampled by the policy that it is taken to be of."""
        return self._sources.on_policy

    def _get_output_dir(self, trial: Any) -> str:
        """Where the checkpoints go."""
        folder = super()._get_output_dir(trial)
        if self.args.num_iterations > 1:
            folder = str(Path(folder) / f"iteration-{self._iterations.current}")
        return folder

    def load_base_model(self) -> PreTrainedModel:
        """The base model, in the precision that it was saved in unless `args` says otherwise."""
        return load_base_model(self.base_model, self.args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._metrics[mode].sums is not None:
            metrics = self._metrics[mode].compute(self.accelerator)
            prefix = f"{self._prefix}_" if mode == "eval" else ""
            logs.update({prefix + k: v for k, v in metrics.items()})
        if self.args.num_iterations > 1:
            logs["iteration"] = self._iterations.current
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """
        Evaluates on the rollouts of the trainer's `eval_dataset`, or of the one of that name.
        Further arguments are those of [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: `eval_loss` and the measures of every objective, such as
            `eval_explained_variance/<objective>`.

        Raises:
            ValueError: `eval_dataset` is a dataset, of which there are no rollouts.
        """
        asked: Any = eval_dataset
        if not isinstance(eval_dataset, (str, type(None))):
            raise ValueError(
                "`evaluate` needs rollouts: give these prompts to the trainer as `eval_dataset`"
            )
        self.collect_rollouts()
        self._prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluate(asked, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not there: values are of rollouts, and `evaluate` compares them with rewards.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "a value model predicts values of prefixes, not of rows of a dataset: give prompts to "
            "the trainer as `eval_dataset` and call `evaluate()`, or call the saved model on "
            "token ids"
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = self._training.compute_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(str(folder), state_dict=state_dict)
            if self.args.should_save:
                self._training.save(folder)
                write_json(folder / INPUTS, self._iterations.run.inputs)
        elif self.args.should_save:  # transformers 5.23 calls this in every process
            self._save_value_model(folder, state_dict)

    def _save_value_model(self, folder: Path, state_dict: dict | None) -> None:
        """Saves a value model or its adapter, and the tokenizer, without pickled arguments."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._kept is not None:
            weights = model.state_dict() if state_dict is None else state_dict
            model, state_dict = joined_heads(self._kept, weights, self.value_config), None
        if is_peft_model(model) and not self.args.merge_adapter:
            self.value_config.save_pretrained(folder)
        elif is_peft_model(model):
            model, state_dict = copy.deepcopy(model).merge_and_unload(), None
        model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

    @contextmanager
    def _hub_folder(self) -> Any:
        """`output_dir` is a folder of its own: a push takes all of it, rollouts too."""
        folder = self.args.output_dir
        self.args.output_dir = str(Path(folder) / "_hub")
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self.args.output_dir = folder

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Uploads the value model, its tokenizer and its card; not the rollouts in `output_dir`.
        Arguments are those of [`~transformers.Trainer.push_to_hub`].
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        with self._hub_folder():
            return super().push_to_hub(commit_message, blocking, token, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._hub_folder():
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the value model's own card, as [`~trimtab.plugins.MAVISValueModel`] saves it."""
        config = self.value_config
        if self._kept is not None:
            config = joined_config(self._kept.config, config)
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(model_card(config))
