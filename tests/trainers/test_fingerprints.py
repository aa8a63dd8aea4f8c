"""What differs has another fingerprint, and the same thing has the same one in another process."""

import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from trimtab.trainers.fingerprints import (
    columns_read,
    digest_of,
    identify,
    known,
    weights_fingerprint,
)
from trimtab.trainers.rewards import ClassifierReward

from .conftest import ROOT, make_model, make_tokenizer

# Every line computes something else than the others, but those of equal letters.
SHARED = """
import dataclasses, enum, functools, math, re, threading
from pathlib import Path
import numpy as np
import torch
import scoring

LIMIT = 10
WORDS = {"good", "kind", "warm", "bright"}
RULES = {"a.*": 1, "ab": 2}
PATTERN = re.compile("a+")
LOCK = threading.Lock()

def f(completions, target="red", *, scale=1, **columns):
    return [0.0]

class Scaled:
    bias = 0.0
    def __init__(self, n, **more):
        self.n = n
        self.__dict__.update(more)
    def __call__(self, completions, **columns):
        return [self.n + self.bias for _ in completions]
    def other(self, completions, **columns):
        return [self.n]

class Louder(Scaled):
    def __call__(self, completions, **columns):
        return [2 * x for x in super().__call__(completions)]

class Slotted:
    __slots__ = ("n",)
    def __init__(self, n):
        self.n = n
    def __call__(self, completions, **columns):
        return [self.n]

@dataclasses.dataclass
class Settings:
    n: int = 1
    names: list = dataclasses.field(default_factory=list)

class Colour(enum.Enum):
    RED = 1
    BLUE = 2

def closure(n):
    return lambda completions, **columns: [n]

def deep(n):
    def inner():
        return n
    return lambda completions, **columns: [inner()]

def helper(text):
    return len(text)

def other_helper(text):
    return len(text) + 1

def through(use):
    return lambda completions, **columns: [use(text) for text in completions]

@functools.cache
def cached(n):
    return n

def marked(mark):
    def inner(completions, **columns):
        return [inner.mark]
    inner.mark = mark
    return inner

def wrapped(func):
    @functools.wraps(func)
    def inner(*args, **kwargs):
        return func(*args, **kwargs)
    return inner

def counts(completions, **columns):
    return [len(text) for text in completions]

def counts_more(completions, **columns):
    return [len(text) + 1 for text in completions]

def looped(n):
    data = [n]
    data.append(data)
    return lambda completions, **columns: [data[0]]

def importing(completions, **columns):
    import scoring
    return [scoring.rate(text) for text in completions]

def naming(completions, **columns):
    return [scoring.rate(text) for text in completions]

def limited(completions, **columns):
    return [min(len(text), LIMIT) for text in completions]

def worded(completions, **columns):
    return [sum(word in WORDS for word in text.split()) for text in completions]

def ruled(completions, **columns):
    return [next(v for k, v in RULES.items() if re.match(k, text)) for text in completions]

def matched(completions, **columns):
    return [len(PATTERN.findall(text)) for text in completions]
"""
FUNCTIONS = [
    "f", "functools.partial(f, target='red')", "functools.partial(f, target='blue')",
    "functools.partial(f, scale=1)", "functools.partial(f, scale=1.0)",
    "functools.partial(f, scale=True)", "functools.partial(f, scale='1')",
    "functools.partial(f, scale=[1, 2])", "functools.partial(f, scale=(1, 2))",
    "functools.partial(f, scale=[[1], 2])", "functools.partial(f, scale={'a': 1, 'b': 2})",
    "functools.partial(f, scale={'b': 2, 'a': 1})", "functools.partial(f, scale={1, 2})",
    "functools.partial(f, scale=-0.0)", "functools.partial(f, scale=0.0)",
    "functools.partial(f, scale=np.zeros(3))", "functools.partial(f, scale=np.zeros(4))",
    "functools.partial(f, scale=np.zeros(3, np.float32))", "functools.partial(f, scale=np.ones(3))",
    "functools.partial(f, scale=torch.ones(3))", "functools.partial(f, scale=torch.zeros(3))",
    "functools.partial(f, scale=Settings())", "functools.partial(f, scale=Settings(2))",
    "functools.partial(f, scale=Settings(names=['a']))",
    "functools.partial(f, scale=Colour.RED)", "functools.partial(f, scale=Colour.BLUE)",
    "functools.partial(f, scale=Path('a'))", "functools.partial(f, scale=re.compile('a'))",
    "functools.partial(f, scale=re.compile('a', re.I))",
    "functools.partial(f, scale=re.compile('b'))",
    "functools.partial(f, scale=torch.nn.Linear)", "functools.partial(f, scale=math.sin)",
    "functools.partial(f, scale=math.cos)", "functools.partial(f, scale=range(3))",
    "functools.partial(f, scale=range(4))", "functools.partial(f, scale=1 + 2j)",
    "Scaled(1)", "Scaled(2)", "Scaled(1, deep={'a': [1]})", "Scaled(1, deep={'a': [2]})",
    "Scaled(Scaled(1))", "Scaled(Scaled(2))", "Louder(1)", "Scaled(1).other", "Scaled(2).other",
    "Slotted(1)", "Slotted(2)", "closure(1)", "closure(2)", "closure('1')", "closure(None)",
    "closure(Scaled(1))", "closure(Scaled(2))", "deep(1)", "deep(2)", "through(helper)",
    "through(other_helper)", "through(len)", "through(cached)", "marked('a')", "marked('b')",
    "wrapped(counts)", "wrapped(counts_more)", "counts", "counts_more", "looped(1)", "looped(2)",
    "importing", "naming", "limited", "worded", "ruled", "matched",
    "lambda completions, **columns: [1.0]", "lambda completions, **columns: [2.0]",
    "lambda completions, **columns: [abs(1.0)]", "lambda completions, **columns: [float(1.0)]",
    "lambda completions, **columns: [x for x in [1.0]]",
    "lambda completions, **columns: [x for x in [2.0]]",
]  # fmt: skip
MODULE = "from deeper import factor\ndef rate(text):\n    return factor * len(text)\n"
# What the functions named call or read is changed behind their backs.
CHANGES = {
    ("LIMIT = 10", "LIMIT = 11"): {"limited"},
    ('"warm", ', ""): {"worded"},
    ('{"a.*": 1, "ab": 2}', '{"ab": 2, "a.*": 1}'): {"ruled"},
    ('re.compile("a+")', 're.compile("a*")'): {"matched"},
    ("return len(text)\n\ndef other", "return len(text) + 2\n\ndef other"): {"through(helper)"},
    ("    bias = 0.0", "    bias = 1.0"): {f for f in FUNCTIONS if "Scaled" in f or "Louder" in f},
}
SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
import rewards_here
from trimtab.trainers.fingerprints import identify
print(json.dumps([identify(eval(one, vars(rewards_here))) for one in {functions!r}]))
"""


def identities(folder, shared=SHARED, deeper="factor = 1\n", seed="0"):
    """Of all functions, in a process of their own."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards_here.py").write_text(shared)
    (folder / "scoring.py").write_text(MODULE)
    (folder / "deeper.py").write_text(deeper)
    script = SCRIPT.format(folder=str(folder), functions=FUNCTIONS)
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return dict(zip(FUNCTIONS, json.loads(made.stdout)))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return identities(tmp_path_factory.mktemp("first") / "a")


def test_functions_that_differ_are_never_alike(first):
    assert all(map(known, first.values())), [f for f, i in first.items() if not known(i)]
    alike = [pair for pair in itertools.combinations(first, 2) if first[pair[0]] == first[pair[1]]]
    assert alike == []


def test_the_same_function_is_alike_in_another_process_and_place(first, tmp_path):
    assert identities(tmp_path, seed="31337") == first


def test_what_a_function_calls_or_reads_enters(first, tmp_path):
    shared = SHARED
    for old, new in CHANGES:
        assert old in shared
        shared = shared.replace(old, new)
    again = identities(tmp_path, shared)
    assert {f for f in FUNCTIONS if first[f] != again[f]} == set.union(*CHANGES.values())


def test_modules_of_ones_own_enter_with_what_they_import(first, tmp_path):
    again = identities(tmp_path, deeper="factor = 2\n")
    assert {f for f in FUNCTIONS if first[f] != again[f]} == {"importing", "naming"}


def test_calling_a_function_leaves_its_identity():
    seen = {}

    def count(completions, **columns):
        return [sum(ord(c) for c in text) for text in completions]

    before = identify(count)
    for _ in range(1000):  # enough for the interpreter to specialise its code
        count(["abc"])
    assert identify(count) == before and seen == {}


def test_unknown_state_is_alike_nothing_and_said_once(monkeypatch):
    messages = []
    monkeypatch.setattr("trimtab.trainers.fingerprints.logger.warning_once", messages.append)
    lock = threading.Lock()

    def guarded(completions, **columns):
        with lock:
            return [0.0] * len(completions)

    assert identify(guarded) != identify(guarded) and not known(identify(guarded))
    assert len(set(messages)) == 1
    assert "'test_unknown_state_is_alike_nothing_and_said_once.<locals>.guarded'" in messages[0]
    assert "`guarded.version = '1'`" in messages[0] and "_thread.lock" in messages[0]


def test_a_version_replaces_the_guess():
    def make(n):
        lock = threading.Lock()

        def judge(completions, **columns):
            with lock:
                return [n] * len(completions)

        return judge

    a, b, c = make(1), make(2), make(1)
    a.version, b.version, c.version = "1", "1", "2"
    assert identify(a) == identify(b) != identify(c) and known(identify(a))

    class Judge:
        def __init__(self, version):
            self.version, self.lock = version, threading.Lock()

        def __call__(self, completions, **columns):
            return []

    assert identify(Judge(1)) == identify(Judge(1)) != identify(Judge(2))
    assert identify(Judge(1).__call__) == identify(Judge(1).__call__)


def test_reward_models_are_told_by_their_weights(tmp_path):
    tokenizer = make_tokenizer()
    fields = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1,
              "pad_token_id": 0}  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**fields))
    found = []
    for name in ("a", "moved"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        found.append(identify(ClassifierReward(str(tmp_path / name))))
    with torch.no_grad():
        model.score.weight[0, 3] += 1e-3
    model.save_pretrained(tmp_path / "a")
    found.append(identify(ClassifierReward(str(tmp_path / "a"))))
    assert found[0] == found[1] != found[2]


def test_columns_that_a_function_reads_are_found():
    def named(completions, target, **kwargs):
        return []

    def ignoring(completions, **kwargs):
        return []

    def taking(completions, **kwargs):
        return kwargs["target"]

    def passing(completions, **kwargs):
        return named(completions, **kwargs)

    def inner(completions, **kwargs):
        return [(lambda: kwargs)() for _ in completions]

    class Called:
        def __call__(self, completions, source, **kwargs):
            return []

        def method(self, completions, target, **kwargs):
            return []

    columns = ["target", "source"]
    for func, read in (
        (named, ["target"]),
        (ignoring, []),
        (taking, ["source", "target"]),
        (passing, ["source", "target"]),
        (inner, ["source", "target"]),
        (Called(), ["source"]),
        (Called().method, ["target"]),
        (len, []),
    ):
        assert columns_read(func, columns) == read


def test_digests_of_columns_tell_values_apart():
    values = [["a"], ["b"], ["a", "a"], [1], [1.0], [None], [["a"]], [{"a": 1}], [np.array([1])]]
    assert len({digest_of(v) for v in values}) == len(values)


@pytest.fixture
def base(tmp_path):
    make_model(hidden_size=256, num_attention_heads=8, intermediate_size=2048).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


def test_weights_changed_at_the_same_path_are_told_apart(base):
    from safetensors.torch import load_file, save_file

    path = base / "model.safetensors"
    before = weights_fingerprint(str(base))
    weights = load_file(path)
    large = "model.layers.1.mlp.up_proj.weight"
    assert weights[large].nbytes > 2**20, "not read whole"
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", large):
        changed = {k: v.clone() for k, v in weights.items()}
        changed[name] += 1e-3 * torch.randn_like(changed[name])
        save_file(changed, path, metadata={"format": "pt"})
        assert weights_fingerprint(str(base)) != before, name
    save_file(weights, path, metadata={"format": "pt"})
    assert weights_fingerprint(str(base)) == before
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert weights_fingerprint(str(base)) == before
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert weights_fingerprint(str(base)) != before


def test_hub_ids_are_read_from_their_snapshot(base, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    asked = []

    def cached_file(name, file, **kwargs):
        asked.append((name, file, kwargs))
        return str(snapshot / file)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    found = weights_fingerprint("me/base", {"revision": "abc", "dtype": "auto"})
    assert found == weights_fingerprint(str(snapshot))
    assert asked == [("me/base", "config.json", {"revision": "abc"})]


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no weights of the base model"):
        weights_fingerprint(str(tmp_path))
