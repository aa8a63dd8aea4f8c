"""Responses that are there already, learnt from by two processes of `accelerate launch`."""

import textwrap

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from trimtab.plugins import heads
from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import read_rollouts

from .conftest import in_two_processes
from .test_data import scored, trainer
from .test_head_training import FIELDS
from .test_rollouts import same

HIDDEN = FIELDS
STATE = {"num_hidden_layers": 2}
SHARED = {
    "num_train_epochs": 2, "rollout_batch_size": 3, "per_device_train_batch_size": 2,
    "save_strategy": "epoch", "learning_rate": 0.05, "optim": "sgd",
}  # fmt: skip


def make(base_model, folder, fields, **more):
    heads.DROPOUT = 0.0  # whose draws are each process's own
    rows = Dataset.from_list(scored(8, each=1))
    held_out = Dataset.from_list(scored(5, 3, seed=1, each=2))
    return trainer(base_model, folder, rows, held_out, **{**fields, **SHARED, **more})


@pytest.mark.parametrize("fields", [HIDDEN, STATE], ids=["heads", "backbone"])
def test_two_processes_learn_what_one_does_and_one_writes(
    base_model, tmp_path, monkeypatch, fields
):
    """
    Over gloo: of a step's two batches each process has one, or one process accumulates both. What
    each writes is seen by an `output_dir` of its own, and in the rollouts, which they share.
    """
    program, rollouts = tmp_path / "train.py", tmp_path / "rollouts"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            from pathlib import Path
            from safetensors.torch import save_file
            from tests.trainers.test_processes import make

            folder, renamed = Path({str(tmp_path)!r}, "rank-" + os.environ["RANK"]), set()

            def watch(event, args):
                if event == "os.rename" and str(args[1]).startswith({str(rollouts)!r}):
                    renamed.add(Path(args[1]).name)

            sys.addaudithook(watch)
            made = make({base_model!r}, folder, {fields!r}, rollout_dir={str(rollouts)!r})
            assert made.accelerator.num_processes == 2
            made.train()
            made.save_model()
            weights = {{k: v.contiguous() for k, v in made.model.state_dict().items()}}
            save_file(weights, f"{{folder}}.safetensors")
            Path(f"{{folder}}.txt").write_text(" ".join(sorted(renamed)))
            """
        )
    )
    in_two_processes(program)
    ranks = [load_file(tmp_path / f"rank-{i}.safetensors") for i in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    saved = MAVISValueModel.load(str(tmp_path / "rank-0"))
    torch.testing.assert_close(saved.state_dict(), ranks[0])
    # The other one keeps its random state, and computes its share of the hidden states.
    files = {path.name for path in (tmp_path / "rank-1").rglob("*") if path.is_file()}
    assert files == {"rng_state_1.pth"}
    renamed = [set((tmp_path / f"rank-{i}.txt").read_text().split()) for i in range(2)]
    assert {"rollouts.json", "trees-00000.parquet"} <= renamed[0]
    assert all(name.endswith(".hidden.safetensors") for name in renamed[1])
    assert bool(renamed[1]) == (fields is HIDDEN)

    monkeypatch.setattr(heads, "DROPOUT", 0.0)
    alone = make(base_model, tmp_path / "one", fields, gradient_accumulation_steps=2)
    before = {name: x.detach().clone() for name, x in alone.model.named_parameters()}
    alone.train()
    for name in ("train", "eval"):
        same(read_rollouts(rollouts / name), read_rollouts(tmp_path / "one" / "rollouts" / name))
    after = dict(alone.model.named_parameters())
    assert max((after[name] - x).abs().max() for name, x in before.items()) > 1e-2
    for name, x in after.items():
        torch.testing.assert_close(x.detach(), ranks[0][name], rtol=1e-4, atol=1e-5)
    if fields is HIDDEN:
        assert alone.value_config.candidate_scale == pytest.approx(
            saved.config.candidate_scale, rel=1e-3
        )
