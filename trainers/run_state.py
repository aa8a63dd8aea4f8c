"""What a run of training was made from and how far it is: one small file in `output_dir`.

`run_state.json` holds, for every iteration, what went into it, whether it is finished and the
fingerprints of the weights that it ended with. It is written last, whole or not at all: what it
does not say did not happen. Every checkpoint holds what went into it, too, in `run_inputs.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .files import write_json
from .fingerprints import guidance_fingerprint, safetensors_header
from .trees import Tree

logger = logging.get_logger(__name__)

FORMAT = 1
STATE, INPUTS = "run_state.json", "run_inputs.json"
# Arguments that a training does not depend on
FREE = re.compile(
    r"output_dir|rollout_dir|run_name|project|trackio_.*|report_to|disable_tqdm|log_.*|logging_.*"
    r"|save_(?!only).*|save_only_model|eval_.*|hub_.*|push_to_hub|resume_from_checkpoint|do_.*"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor"
    r"|multiprocessing_context)|ddp_.*|local_rank|debug|skip_memory_metrics"
    r"|torch_empty_cache_steps|(gradient|activation)_checkpointing.*|torch_compile.*|use_cpu"
    r"|use_cache|include_.*|prediction_loss_only|per_device_eval_batch_size|batch_eval_metrics"
    r"|enable_jit_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint"
    r"|full_determinism|fsdp.*|deepspeed|parallelism_config|accelerator_config|label_names"
    r"|num_iterations|monotonic_check|rollout_batch_size|generation_batch_size|use_vllm|vllm_.*"
    r"|num_ray_workers"
)
CHOOSING = re.compile(r"eval_.*|save_.*")  # matter where the best checkpoint is loaded at the end


@dataclass
class RunState:
    """
    State of the run in `output_dir`.

    Args:
        args ([`MAVISConfig`]):
            Of the run that is made now.
        write (`bool`):
            Whether this is the process that writes it.
        merged (`bool`):
            Whether adapters are merged into the value models that are saved, so that the weights
            to train on are saved beside them.
        iterations (`list[dict]`):
            For every iteration that has begun: `inputs`, `finished`, and `weights`, the
            fingerprints of what was saved.
        inputs (`dict[str, Any]`):
            What the iteration that is made now is made from.
    """

    args: Any
    write: bool
    merged: bool
    iterations: list[dict[str, Any]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, args: Any, write: bool, merged: bool) -> RunState:
        """Of the run that `output_dir` holds; empty if there is none."""
        path = Path(args.output_dir) / STATE
        if not path.exists():
            return cls(args, write, merged)
        try:
            found = json.loads(path.read_text())
            if found["format"] == FORMAT:
                return cls(args, write, merged, found["iterations"])
            problem = f"has the format {found['format']}, this version reads {FORMAT}"
        except (ValueError, KeyError, TypeError) as error:
            problem = f"cannot be read ({error})"
        raise ValueError(f"{str(path)!r} {problem}: give another `output_dir`, or remove that file")

    def value_model(self, iteration: int) -> Path:
        """Folder of the value model that an iteration has ended with."""
        return Path(self.args.output_dir) / f"iteration-{iteration}" / "value_model"

    def weights(self, iteration: int) -> Path:
        """The same as training can take it up again: an adapter is not merged there."""
        folder = self.value_model(iteration)
        return folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-final") if self.merged else folder

    def folders(self, iteration: int) -> list[Path]:
        """All that is saved of an iteration, in the same order in every process."""
        return [*dict.fromkeys((self.value_model(iteration), self.weights(iteration)))]

    def _saved(self, iteration: int) -> dict[str, str]:
        return {folder.name: guidance_fingerprint(folder) for folder in self.folders(iteration)}

    def is_finished(self, iteration: int) -> bool:
        """Whether an earlier run has finished the iteration from the same inputs."""
        entry = self._entry(iteration)
        if entry is None or not entry["finished"]:
            return False
        if changed := self._changed(entry["inputs"]):
            self._refuse_to_resume(changed)
        try:
            if self._saved(iteration) == entry["weights"]:
                return True
            problem = "it was changed"
        except (OSError, ValueError) as error:
            problem = str(error)
        logger.warning(
            f"{str(self.value_model(iteration))!r} is skipped, {problem}: the iteration is "
            "trained again"
        )
        return False

    def begin(self, iteration: int, resume: str | bool | None, run_dir: str) -> str | None:
        """
        Says that an iteration begins; what came after it in an earlier run is forgotten.

        Returns the checkpoint to go on with, of those in `run_dir`, or None; it had the same
        inputs. Raises `ValueError` where what is to be resumed had others.
        """
        before = self._entry(iteration)
        changed = self._changed(before["inputs"]) if before else []
        checkpoint = None
        if resume and changed:
            self._refuse_to_resume(changed)
        if resume and (before or not self.iterations):
            checkpoint = self._checkpoint(resume, run_dir, known=before is not None)
        if changed:
            logger.warning(
                f"{self.args.output_dir!r} holds an earlier run, and {'; '.join(changed)}: what "
                "that run trained is not used, and is replaced"
            )
        started = {"inputs": dict(self.inputs), "finished": False}
        self.iterations = [*self.iterations[:iteration], started]
        self._write()
        return checkpoint

    def finish(self, iteration: int, saved: bool) -> None:
        """Says that an iteration has ended, and whether its weights were saved."""
        weights = self._saved(iteration) if saved else {}
        self.iterations[iteration] |= {"finished": True, "weights": weights}
        self._write()

    def _entry(self, iteration: int) -> dict[str, Any] | None:
        return self.iterations[iteration] if iteration < len(self.iterations) else None

    def _write(self) -> None:
        if self.write:
            state = {"format": FORMAT, "iterations": self.iterations}
            write_json(Path(self.args.output_dir) / STATE, state)

    def _changed(self, inputs: Mapping[str, Any]) -> list[str]:
        fields = dataclasses.fields(self.args)
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        return differences(inputs, self.inputs, defaults)

    def _refuse_to_resume(self, changed: Sequence[str]) -> None:
        raise ValueError(
            f"what {self.args.output_dir!r} holds cannot be resumed: {'; '.join(changed)}. Give "
            "what it was made with, or another `output_dir`; without `resume_from_checkpoint` it "
            "is trained anew, from the rollouts that are there"
        )

    def _checkpoint(self, resume: str | bool, run_dir: str, known: bool) -> str | None:
        """
        The checkpoint to go on with: the one given, or the last complete one of the same inputs.
        `known` says that this run has begun before, so that others are left by an earlier one.
        """
        given = isinstance(resume, str)
        others: list[str] = []
        for folder in [Path(resume)] if isinstance(resume, str) else checkpoints(Path(run_dir)):
            problem = checkpoint_problem(folder, not self.args.save_only_model)
            if problem and given:
                raise ValueError(
                    f"the checkpoint {resume!r} is not complete, {problem}; give another one, or "
                    "`resume_from_checkpoint=True`, which takes the last complete one"
                )
            stamp = folder / INPUTS
            changed = ["it does not say what it was made from"]
            if stamp.exists() and not problem:
                changed = self._changed(json.loads(stamp.read_text()))
            elif given:
                logger.warning(
                    f"{resume!r} does not say what it was made from: whether it belongs to these "
                    "rollouts and arguments cannot be checked"
                )
                changed = []
            if not problem and not changed:
                return str(folder)
            if not problem and (given or not known):
                others = others or changed
            else:
                logger.warning(f"{str(folder)!r} is skipped: {problem or '; '.join(changed)}")
        if others:
            self._refuse_to_resume(others)
        logger.warning(f"no checkpoint in {run_dir!r} yet: training begins")
        return None


def arguments_of(args: Any) -> dict[str, Any]:
    """The arguments that a training depends on, ready for JSON."""
    found = {}
    for one in dataclasses.fields(args):
        chooses = args.load_best_model_at_end and CHOOSING.fullmatch(one.name)
        if chooses or not FREE.fullmatch(one.name):
            found[one.name] = getattr(args, one.name)
    return json.loads(json.dumps(found, default=str, sort_keys=True))


def adapter_of(model: Any) -> dict[str, Any]:
    """The `adapter` that a model is trained by, if it is, ready for JSON."""
    found = {}
    for config in getattr(model, "peft_config", {}).values():
        fields = json.loads(json.dumps(config.to_dict(), default=_sorted_text))
        for name in ("base_model_name_or_path", "auto_mapping", "peft_version"):
            fields.pop(name, None)  # the same weights may be elsewhere
        found["adapter"] = fields
    return found


def _sorted_text(value: Any) -> Any:
    """Of what JSON has no form for: a set in order, anything else as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def differences(
    found: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """
    What has changed between two inputs, in words.

    Args:
        found (`dict[str, Any]`):
            Inputs of an earlier run.
        now (`dict[str, Any]`):
            Inputs of this one.
        defaults (`dict[str, Any]`):
            Values of arguments that one of them does not know yet, or no more.
    """
    a, b = _flat(found), _flat(now)
    known = {f"arguments/{k}": v for k, v in defaults.items()}
    changed = []
    for key in sorted(a.keys() | b.keys()):
        was, is_now = a.get(key, known.get(key)), b.get(key, known.get(key))
        if was != is_now:
            changed.append(f"{key.removeprefix('arguments/')} was {was!r} and is {is_now!r}")
    return changed


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "adapter":
            flat |= {f"{key}/{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat


def trees_fingerprint(trees: Sequence[Tree]) -> dict[str, Any]:
    """Fingerprints of the responses and of every reward, for [`RunState`]."""
    responses = hashlib.sha256()
    rewards: dict[str, Any] = {}
    for tree in trees:
        nodes = tree.nodes
        shape = [(n.parent, n.layer, n.leaf, len(n.tokens), len(n.kls)) for n in nodes]
        responses.update(np.array([tree.prompt_index, len(nodes)], dtype=np.int64).tobytes())
        responses.update(np.array(shape, dtype=np.int64).tobytes())
        responses.update(np.array([t for n in nodes for t in n.tokens], dtype=np.int64).tobytes())
        numbers = [x for n in nodes for x in (n.weight, *n.kls)]
        responses.update(np.array(numbers, dtype=np.float64).tobytes())
        for name, values in tree.rewards.items():
            rewards.setdefault(name, hashlib.sha256()).update(values.tobytes())
    return {
        "responses": responses.hexdigest()[:16],
        **{f"reward {name}": digest.hexdigest()[:16] for name, digest in sorted(rewards.items())},
    }


def checkpoint_problem(folder: Path, with_optimizer: bool = True) -> str | None:
    """
    Why a checkpoint cannot be taken up, if it cannot: a kill or a full disk cut it off.

    It is complete if `trainer_state.json`, which is written last, can be read, if the weights are
    there and every file of tensors has its whole length.

    Args:
        folder (`Path`):
            Of a [`~transformers.Trainer`].
        with_optimizer (`bool`, *optional*, defaults to `True`):
            Whether the state of optimizer and schedule must be there.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except FileNotFoundError:
        return "it has no trainer_state.json"
    except ValueError:
        return "its trainer_state.json is cut off"
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            start, header = safetensors_header(path)
        except ValueError:
            return f"its {path.name} is cut off"
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size < start + end:
            return f"its {path.name} is cut off"
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        if not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off"
    for index in folder.glob("*.safetensors.index.json"):
        missing = set(json.loads(index.read_text())["weight_map"].values())
        if missing := missing - {path.name for path in weights}:
            return f"it has no {min(missing)}"
    if any(path.is_dir() for path in folder.iterdir()):
        return None  # sharded, by FSDP or DeepSpeed, in folders of their own
    if not weights:
        return "it has no weights"
    for name in ("optimizer.pt", "scheduler.pt"):
        if with_optimizer and not (folder / name).exists():
            return f"it has no {name}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last first."""
    steps = {
        int(found[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [steps[step] for step in sorted(steps, reverse=True)]
