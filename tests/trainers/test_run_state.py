"""Runs that follow one another in a folder: what is used again, refused, or skipped."""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers.utils import logging as transformers_logging

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import read_rollouts
from trimtab.trainers.run_state import checkpoint_problem, checkpoints

from .conftest import ROOT, make_model, make_tokenizer
from .test_mavis_trainer import prompts, trainer
from .test_rollouts import same

FIELDS = {
    "num_iterations": 2, "beta": 2.0, "top_k": 8, "layers": 2, "root_children": 2,
    "num_train_epochs": 2, "max_completion_length": 8, "per_device_train_batch_size": 2,
    "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1,
    "seed": 3,  # whose first values guide, with the oldest torch, too
}  # fmt: skip


def scored(text, word="good"):
    return float(text.count(word) - text.count("bad"))


def helped(completions, **columns):
    return [scored(text) for text in completions]


def other_scored(text, word="good"):
    return float(text.count("red"))


def valued(completions, target, **columns):
    return [float(text.count(word)) for text, word in zip(completions, target)]


def worded(completions, word="good", **columns):
    return [float(text.count(word)) for text in completions]


def closed(word):
    return lambda completions, **columns: [float(text.count(word)) for text in completions]


class Counted:
    def __init__(self, word):
        self.word = word

    def __call__(self, completions, **columns):
        return [float(text.count(self.word)) for text in completions]


def data(count=4, words="good", offset=0):
    made = prompts(count, offset)
    return made.add_column("target", [words] * count)


@pytest.fixture
def base(tmp_path):
    """A base model of this test's own."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def run(base, folder, resume=False, rewards=None, dataset=None, **fields):
    """Final value model's weights."""
    made = trainer(
        base, folder, rewards or {"goodness": helped}, data() if dataset is None else dataset,
        **{"eval_dataset": data(2, offset=5), **FIELDS, **fields},
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    made.save_model()
    return MAVISValueModel.load(str(folder)).state_dict()


def outcome(folder):
    """All that a run has trained: the final weights, those of its last iteration, and the scale."""
    found = {}
    for name in (".", "iteration-1/value_model"):
        model = MAVISValueModel.load(str(folder / name))
        found |= {f"{name} {k}": v for k, v in model.state_dict().items()}
        found[f"{name} scale"] = torch.tensor(model.config.candidate_scale)
    return found


def train_more_weights(base):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(base)


def end_elsewhere(base):
    config = {"eos_token_id": [0, 5], "pad_token_id": 0}
    (Path(base) / "generation_config.json").write_text(json.dumps(config))


# (what the first run has, what the second one has); callables change the base model in between.
PAIRS = {
    "learning_rate": ({}, {"learning_rate": 1e-2}),
    "epochs": ({}, {"num_train_epochs": 1}),
    "batch": ({}, {"per_device_train_batch_size": 1}),
    "warmup": ({}, {"warmup_steps": 0}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "optimizer": ({}, {"optim": "sgd"}),
    "seed": ({}, {"seed": 7}),
    "layers": ({}, {"layers": 1}),
    "temperature": ({}, {"temperature": 0.7}),
    "length": ({}, {"max_completion_length": 6}),
    "beta": ({}, {"beta": 4.0}),
    "kl_penalty": ({}, {"kl_penalty": 0.0}),
    "leaf_fraction": ({}, {"leaf_fraction": 1.0}),
    "max_length": ({}, {"max_length": 12}),
    "depth": ({}, {"num_hidden_layers": 1}),
    "adapter": ({}, {"peft_config": LoraConfig(r=2)}),
    "prompts": ({}, {"dataset": data(4, offset=3)}),
    "eval prompts": ({}, {"eval_dataset": data(2, offset=7)}),
    "column": (
        {"rewards": {"goodness": valued}},
        {"rewards": {"goodness": valued}, "dataset": data(4, "red")},
    ),
    "partial": tuple(
        {"rewards": {"goodness": functools.partial(worded, word=w)}} for w in ("good", "red")
    ),
    "closure": tuple({"rewards": {"goodness": closed(w)}} for w in ("good", "red")),
    "attribute": tuple({"rewards": {"goodness": Counted(w)}} for w in ("good", "red")),
    "helper": ({}, {}),
    "base weights": ({}, {"change": train_more_weights}),
    "end tokens": ({}, {"change": end_elsewhere}),
}


QUICK = {"save_strategy": "no"}


@pytest.fixture(scope="module")
def plain(base_model, tmp_path_factory):
    """A run of nothing special."""
    folder = tmp_path_factory.mktemp("plain")
    run(base_model, folder, **QUICK)
    return folder


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_after_another_one_is_as_in_an_empty_folder_or_refused(
    request, tmp_path, pair, monkeypatch
):
    first, second = PAIRS[pair]
    second = {**QUICK, **second}
    change = second.pop("change", None)
    if first or change:
        base = request.getfixturevalue("base")
        run(base, tmp_path / "first", **QUICK, **first)
    else:
        base = request.getfixturevalue("base_model")
        shutil.copytree(request.getfixturevalue("plain"), tmp_path / "first")
    if change:
        change(base)
    if pair == "helper":
        monkeypatch.setitem(globals(), "scored", other_scored)
    run(base, tmp_path / "empty", **second)
    before, expected = outcome(tmp_path / "first"), outcome(tmp_path / "empty")
    assert before.keys() != expected.keys() or any(
        not torch.equal(before[k], v) for k, v in expected.items()
    ), "the change shows"
    outcomes = []
    for resume in (True, False):
        try:
            run(base, tmp_path / "first", resume, **second)
        except ValueError as error:
            assert "were made with other settings" in str(error) or "cannot be resumed" in str(
                error
            )
            assert str(tmp_path) in str(error) and " was " in str(error)
            outcomes.append("refused")
        else:
            torch.testing.assert_close(outcome(tmp_path / "first"), expected)
            outcomes.append("anew")
    rollouts = ("seed", "layers", "temperature", "length", "beta", "prompts", "eval prompts",
                "base weights", "end tokens")  # fmt: skip
    assert outcomes == ["refused", "refused" if pair in rollouts else "anew"]


@pytest.fixture
def warnings():
    """What the trainers warn of."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = transformers_logging.get_logger("trimtab.trainers.run_state")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_trained_anew_is_said_with_what_has_changed(base_model, tmp_path, warnings):
    run(base_model, tmp_path / "run")
    run(base_model, tmp_path / "run", learning_rate=1e-2)
    (message,) = [m for m in warnings if "earlier run" in m and "is not used" in m][:1]
    assert "learning_rate was 0.003 and is 0.01: what that run trained" in message
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert state["format"] == 1
    assert [one["finished"] for one in state["iterations"]] == [True, True]
    assert {one["inputs"]["arguments"]["learning_rate"] for one in state["iterations"]} == {1e-2}
    aside = list((tmp_path / "run" / "rollouts" / "iteration-1" / "goodness").glob("*-of-*"))
    assert len(aside) == 2, "the rollouts of the old policy are kept"
    # Back again: they are its own.
    again = {path.name: [tree.nodes for tree in read_rollouts(path)] for path in aside}
    run(base_model, tmp_path / "run")
    for name, nodes in again.items():
        folder = aside[0].parent / name.split("-of-")[0]
        assert [tree.nodes for tree in read_rollouts(folder)] == nodes


def test_nothing_is_trained_again_of_the_same_run(base_model, tmp_path):
    expected = run(base_model, tmp_path)
    made = trainer(
        base_model, tmp_path, {"goodness": helped}, data(), eval_dataset=data(2, offset=5), **FIELDS
    )
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 0
    torch.testing.assert_close(made.model.state_dict(), expected)


def test_a_second_training_is_one_of_its_own(base_model, tmp_path):
    """As that of another trainer which starts from the first one's model."""
    made = trainer(
        base_model, tmp_path / "one", {"goodness": helped}, data(),
        eval_dataset=data(2, offset=5), **FIELDS,
    )  # fmt: skip
    made.train()
    made.save_model(str(tmp_path / "middle"))
    first = len(made.state.log_history)
    counted = []
    made.log = lambda logs, *args: counted.append(
        (made._iterations.current, made.args.warmup_steps)
    )
    made.train()
    del made.log
    assert {i for i, _ in counted} == {0, 1, 2} and first
    assert made.args.warmup_steps == 1
    assert {warmup for i, warmup in counted if i == 0} == {1}
    assert len(json.loads((tmp_path / "one" / "iterations.json").read_text())["policies"]) == 3
    other = trainer(
        MAVISValueModel.load(str(tmp_path / "middle")), tmp_path / "two", {"goodness": helped},
        data(), eval_dataset=data(2, offset=5), **FIELDS,
    )  # fmt: skip
    other.train()
    torch.testing.assert_close(made.model.state_dict(), other.model.state_dict())
    one, two = (tmp_path / x / "rollouts" / "iteration-1" / "goodness" / "train" for x in
                ("one", "two"))  # fmt: skip
    same(read_rollouts(one), read_rollouts(two))


SINGLE = {**FIELDS, "num_iterations": 1, "num_train_epochs": 2}


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


CUTS = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "state": lambda folder: cut(folder / "trainer_state.json"),
    "weights": lambda folder: cut(folder / "model.safetensors", 0.99),
    "header": lambda folder: cut(folder / "model.safetensors", 0.001),
    "empty weights": lambda folder: cut(folder / "model.safetensors", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "optimizer": lambda folder: cut(folder / "optimizer.pt", 0.9),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "schedule": lambda folder: cut(folder / "scheduler.pt"),
    "random state": lambda folder: cut(folder / "rng_state.pth"),
}


@pytest.fixture(scope="module")
def single(base_model, tmp_path_factory):
    """A run of one iteration, and its weights."""
    folder = tmp_path_factory.mktemp("single")
    return folder, run(base_model, folder, **SINGLE)


@pytest.mark.parametrize("case", CUTS)
def test_checkpoint_that_is_cut_off_is_known(single, tmp_path, case):
    shutil.copytree(single[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    assert checkpoint_problem(tmp_path / "checkpoint-3") is None
    CUTS[case](tmp_path / "checkpoint-3")
    assert checkpoint_problem(tmp_path / "checkpoint-3")


def test_cut_off_checkpoints_are_skipped_for_the_one_before(base_model, single, tmp_path, warnings):
    shutil.copytree(single[0], tmp_path / "run")
    last, before, *_ = checkpoints(tmp_path / "run")
    CUTS["weights"](last)
    CUTS["no state"](before)
    torch.testing.assert_close(run(base_model, tmp_path / "run", True, **SINGLE), single[1])
    assert f"{str(last)!r} is skipped: its model.safetensors is cut off" in warnings
    assert f"{str(before)!r} is skipped: it has no trainer_state.json" in warnings
    CUTS["weights"](before)
    with pytest.raises(ValueError, match=r"is not complete, its model\.safetensors is cut off"):
        run(base_model, tmp_path / "run", str(before), **SINGLE)


def test_iteration_whose_weights_are_cut_off_is_trained_again(base_model, tmp_path, warnings):
    expected = run(base_model, tmp_path)
    cut(tmp_path / "iteration-0" / "value_model" / "model.safetensors")
    torch.testing.assert_close(run(base_model, tmp_path, True), expected)
    assert any("value_model' is skipped" in message for message in warnings)


def test_checkpoints_of_an_earlier_run_are_not_resumed(base_model, single, tmp_path, warnings):
    """Its last one is of a later step than the new run has reached."""
    shutil.copytree(single[0], tmp_path / "run")
    slower = {**SINGLE, "learning_rate": 1e-3}
    expected = run(base_model, tmp_path / "expected", **slower)
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-4"
    run(base_model, tmp_path / "run", max_steps=2, **{**slower, "save_strategy": "no"})
    # What a kill leaves: the state says that it has begun, checkpoint-4 is the earlier run's.
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    for one in state["iterations"]:
        one["finished"] = False
        one["inputs"]["arguments"] |= {"max_steps": -1}
    (tmp_path / "run" / "run_state.json").write_text(json.dumps(state))
    torch.testing.assert_close(run(base_model, tmp_path / "run", True, **slower), expected)
    assert any("checkpoint-4' is skipped: learning_rate was 0.003" in m for m in warnings)


def test_checkpoints_that_say_nothing_are_refused_unless_they_are_named(
    base_model, single, tmp_path, warnings
):
    shutil.copytree(single[0], tmp_path / "run")
    (tmp_path / "run" / "run_state.json").unlink()
    for folder in checkpoints(tmp_path / "run"):
        (folder / "run_inputs.json").unlink()
    with pytest.raises(ValueError, match="it does not say what it was made from"):
        run(base_model, tmp_path / "run", True, **SINGLE)
    chosen = str(tmp_path / "run" / "checkpoint-2")
    torch.testing.assert_close(run(base_model, tmp_path / "run", chosen, **SINGLE), single[1])
    assert any(m.startswith(f"{chosen!r} does not say") for m in warnings)


@pytest.mark.parametrize(
    ("text", "message"), [('{"format": 9}', "has the format 9"), ("{", "cannot be read")]
)
def test_state_that_cannot_be_read_is_named(base_model, tmp_path, text, message):
    (tmp_path / "run_state.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run_state\.json' {message}.*another `output_dir`"):
        run(base_model, tmp_path, **SINGLE)


def test_only_the_main_process_saves(base_model, tmp_path):
    """transformers 5.23 calls `_save` in every process."""
    made = trainer(base_model, tmp_path, {"goodness": helped}, data(), **SINGLE)
    made.args.__class__ = type(
        "OtherRank", (type(made.args),), {"should_save": property(lambda self: False)}
    )
    made._save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


# What both programs below begin with
KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from tests.trainers.test_run_state import SINGLE, data, run
import torch
from safetensors.torch import save_file

root, seed, kills = Path({root!r}), {seed}, {kills}
fields = dict(rollout_batch_size=1)

def start(folder, **options):
    # A process that has loaded everything, so that a kill costs no start, and a pipe in which it
    # puts a byte whenever it touches a file of its folder.
    global tells
    told, tells = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tells)
        return pid, told
    code = 1
    def hook(event, args):
        if event.startswith(("open", "os.")) and args and str(args[0]).startswith(str(folder)):
            os.write(tells, b".")
    try:
        log = os.open(f"{{folder}}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        os.dup2(2, 1)
        sys.addaudithook(hook)
        state = run({base!r}, folder, **fields, **options)
        save_file(state, folder / "final.safetensors")
        code = 0
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code)

def touches(told, most=sys.maxsize):
    # Waits for so many, or the end of the process, and counts them.
    count = 0
    while count < most and os.read(told, 1):
        count += 1
    return count

def end(folder, pid, told, *codes):
    os.close(told)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log = Path(f"{{folder}}.log").read_text()
    assert code in codes, f"the run in {{folder}} fails: {{log[-2000:]}}"
    return code

def finish(folder, **options):
    # Number of touches of a whole run, and its mean time from one to the next.
    pid, told = start(folder, **options)
    began = time.monotonic()
    count = touches(told)
    end(folder, pid, told, 0)
    return count, (time.monotonic() - began) / count

def interrupt(folder, moment):
    # Whether the run was killed at the moment, in touches, before it had ended.
    pid, told = start(folder, resume=True)
    touches(told, int(moment))
    time.sleep(moment % 1 * gap)  # what is half written has no touches
    os.kill(pid, signal.SIGKILL)
    return end(folder, pid, told, 0, -signal.SIGKILL) != 0
"""

TWICE = (
    KILLS
    + """
(root / "whole").mkdir()
whole, gap = finish(root / "whole")
expected = (root / "whole" / "final.safetensors").read_bytes()
rng, interrupted = random.Random(seed), 0
for kill in range(kills):
    folder, before, left = root / str(kill), root / "before", whole
    folder.mkdir()
    for again in range(2):  # the resumed run is killed, too
        shutil.copytree(folder, before)
        moment = left * rng.random()
        while not interrupt(folder, moment):
            # It had less left to do: once more, and earlier.
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
            moment *= rng.random()
        shutil.rmtree(before)
        left -= moment
        interrupted += 1
    finish(folder, resume=True)
    final = (folder / "final.safetensors").read_bytes()
    assert final == expected, f"kill {{kill}} ends with other weights"
print(json.dumps(interrupted))
"""
)

# A run samples from two servers. At a random request one of them is killed, at a random moment the
# run itself.
SERVED = (
    KILLS
    + """
from contextlib import ExitStack, suppress
from tests.trainers.test_rollouts import same
from tests.trainers.test_samplers import vllm_servers
from trimtab.trainers import read_rollouts, samplers

samplers.SERVER_RETRIES = 0
fields = SINGLE | dict(rollout_batch_size=3, layers=3, save_steps=4, dataset=data(12))
complete, requests, fatal, dying = samplers.ServerSampler._complete, 0, None, None

async def counted(*args):
    global requests
    requests += 1
    os.write(tells, b".")
    if requests == fatal:
        with suppress(ProcessLookupError):  # it is dead
            os.killpg(dying.pid, signal.SIGKILL)
    return await complete(*args)

samplers.ServerSampler._complete = counted

def trees(folder):
    return [list(read_rollouts(folder / "rollouts" / name)) for name in ("train", "eval")]

def serve(count):
    return servers.enter_context(vllm_servers({base!r}, root, count))

rng, deaths = random.Random(seed), 0
with ExitStack() as servers:
    (dying, other), (_, url) = serve(2)
    fields["vllm_server_base_url"] = [other, url]
    (root / "whole").mkdir()
    whole, gap = finish(root / "whole")
    expected = (root / "whole" / "final.safetensors").read_bytes()
    sampled = trees(root / "whole")
    for kill in range(kills):
        if kill and {restart}:
            ((dying, other),) = serve(1)
            fields["vllm_server_base_url"] = [other, url]
        alive = dying.poll() is None
        folder = root / str(kill)
        folder.mkdir()
        fatal, moment = rng.randrange(1, 60), whole * rng.random()
        while not interrupt(folder, moment):
            shutil.rmtree(folder)
            folder.mkdir()
            moment *= rng.random()
        finish(folder, resume=True)
        deaths += alive and dying.poll() is not None
        for trees_now, trees_then in zip(trees(folder), sampled):
            same(trees_now, trees_then)
        final = (folder / "final.safetensors").read_bytes()
        assert final == expected, f"kill {{kill}} ends with other weights"
print(json.dumps(deaths))
"""
)


def killed(program, base_model, folder, kills, seed=0, **more):
    """What a program that kills has printed."""
    script = program.format(root=str(folder), base=base_model, kills=kills, seed=seed, **more)
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    return int(made.stdout.splitlines()[-1])


def test_run_killed_at_a_random_moment_ends_with_the_same_weights(base_model, tmp_path):
    assert killed(TWICE, base_model, tmp_path, 1) == 2


@pytest.mark.long
def test_twenty_runs_killed_at_random_moments_end_with_the_same_weights(base_model, tmp_path):
    assert killed(TWICE, base_model, tmp_path, 20, seed=1) == 40


def test_runs_that_die_while_a_server_does_end_with_the_same_trees_and_weights(
    base_model, tmp_path
):
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    assert killed(SERVED, base_model, tmp_path, 2, restart=False) == 1


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)  # a server starts for every run
def test_twenty_runs_that_die_while_a_server_does_end_with_the_same_trees_and_weights(
    base_model, tmp_path
):
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    assert killed(SERVED, base_model, tmp_path, 20, seed=1, restart=True) == 20
