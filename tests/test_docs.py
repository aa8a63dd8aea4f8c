"""README, docs and docstrings: their Python runs and prints what they show, and their commands,
links and messages are what there is."""

from __future__ import annotations

import ast
import doctest
import functools
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import make_base_model, make_heads, make_value_model
from trimtab.__main__ import COMMANDS
from trimtab.trainers.trees import Node, Tree, write_trees

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
OUTPUT = re.compile(r"\s*```text\n(?P<text>.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PACKAGES = ("plugins", "trainers", "optimizers")
# Where messages to users are raised, and what they call is documented
SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
PUBLIC = [
    *(f"{name}.{x}" for name in PACKAGES for x in import_module(f"trimtab.{name}").__all__),
    "plugins.transformers.MAVISLogitsProcessor",
    "plugins.vllm.MAVISLogitsProcessor",
]


@dataclass
class Block:
    """A fenced block, with the output that is shown under it."""

    language: str
    code: str
    why: str | None
    line: int
    output: str | None


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        shown = OUTPUT.match(text, found.end())
        line = text.count("\n", 0, found.start("code"))
        yield Block(
            found["language"], found["code"], found["why"], line, shown["text"] if shown else None
        )


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_python_or_says_what_it_is(page):
    fences = len(re.findall(r"^ *```", page.read_text(), re.MULTILINE))
    found = list(blocks(page.read_text()))
    assert fences == 2 * len(found), "a block is not closed, indented, or its language no word"
    for block in found:
        assert block.language, f"{name_of(page)}:{block.line} is neither Python nor anything else"
        if block.language == "yaml":
            assert list(yaml.safe_load_all(block.code))
        if block.language == "json":
            json.loads(block.code)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """Tiny models in the place of those that pages name."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base_model(folder / "base")
    objectives = ["readability", "positivity"]
    heads = make_heads(folder / "heads", base, objectives)
    rollouts = heads / "rollouts" / "train"
    rollouts.mkdir(parents=True)
    nodes = [Node(-1, 0, [5, 6]), *(Node(0, 1, [i, 2], leaf=True) for i in range(7, 11))]
    rewards = {"readability": np.array([np.nan, 1.0, 2.0, 3.0, 4.0])}
    write_trees(rollouts / "trees-00000.parquet", [Tree(0, nodes, rewards)], {})
    state = make_value_model(folder / "state", base, objectives)
    return SimpleNamespace(base=base, heads=heads, state=state)


class Endpoint:
    """Stands for `openai.AsyncOpenAI` and a judge behind it, for whom the shorter answer wins."""

    def __init__(self, **kwargs: Any) -> None:
        self.chat = SimpleNamespace(completions=self)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def create(self, messages: list[dict[str, str]], **kwargs: Any) -> SimpleNamespace:
        asked = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nWhich", messages[0]["content"])
        assert asked
        a, b = map(len, asked.groups())
        message = SimpleNamespace(content="tie" if a == b else "A" if a < b else "B")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


class Times:
    """True so many times: the condition of a loop that has no end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __bool__(self) -> bool:
        self.count -= 1
        return self.count >= 0


@pytest.fixture
def names(models, tmp_path, monkeypatch) -> dict[str, Any]:
    """What pages take as given: names, and files in the working directory."""
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.trainers import MAVISConfig, MAVISTrainer, Policy, Response

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openai.AsyncOpenAI", Endpoint)
    (tmp_path / "HuggingFaceTB").mkdir()
    for name, folder in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", models.base),
        ("VALUE_MODEL", models.heads),
        ("STATE_MODEL", models.state),
    ):
        (tmp_path / name).symlink_to(folder)
    logs = [
        {"prompt": f"w{i}", "completion": f" w{j}", "helpful": i / j, "harmless": j > i}
        for i in range(10, 20)
        for j in (12, 17)
    ]
    (tmp_path / "logs.jsonl").write_text("\n".join(map(json.dumps, logs)))

    def readability(completions, **kwargs):
        return [float(len(set(text))) for text in completions]

    def brief(completions, **kwargs):
        return [-float(len(completion[0]["content"].split())) for completion in completions]

    def respond(prompts, weights, seed):
        count = 5 - round(4 * weights.get("brief", 0.0))
        return [Response("w5 " * count, [5] * count + [2], kl=0.5 * (5 - count)) for _ in prompts]

    def conversations(*words: str) -> Dataset:
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": w}] for w in words]})

    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(models.base, padding_side="left")
    return {
        "model": AutoModelForCausalLM.from_pretrained(models.base),
        "tokenizer": tokenizer,
        "inputs": tokenizer(["w5 w6 w7", "w8"], padding=True, return_tensors="pt"),
        "readability": readability,
        "brief": brief,
        "policies": [Policy("unguided", respond, weights=[{}]), Policy("guided", respond)],
        "prompts": conversations("w5", "w6 w7", "w8"),
        "other_prompts": conversations("w9"),
        "load_dataset": load_dataset,
        "MAVISConfig": MAVISConfig,
        "MAVISTrainer": MAVISTrainer,
        "cost": lambda x: float(x[0] ** 2 + rng.normal()),
        "executor": None,
        "serving": Times(100),
        "measure": lambda knobs: float(knobs["cpu"].sum() + rng.normal()),
        "apply_between_measurements": lambda knobs: None,
        "log": SimpleNamespace(info=lambda *message: None),
    }


RUN = [
    page
    for page in PAGES
    if any(b.language == "python" and not b.why for b in blocks(page.read_text()))
]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_python_runs_and_prints_what_is_shown(page, names, capsys):
    for block in blocks(page.read_text()):
        if block.language != "python" or block.why:
            continue
        capsys.readouterr()
        # Lines as the page counts them, so that a trace leads there.
        exec(compile("\n" * block.line + block.code, name_of(page), "exec"), names)
        if block.output is not None:
            printed, shown = capsys.readouterr().out.strip(), block.output.strip()
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
            numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, shown)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.05)  # other machines round


@dataclass
class Docstring:
    """Of a class or function: its text as `help` shows it, and the lines of the file before it."""

    path: Path
    name: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{name_of(self.path)}:{self.name}"


def docstrings(path: Path) -> Iterator[Docstring]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            raw = ast.get_docstring(node, clean=False) or ""
            blank = raw[: len(raw) - len(raw.lstrip())].count("\n")
            line = node.body[0].lineno - 1 + blank
            yield Docstring(path, node.name, inspect.cleandoc(raw), line)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    package, *module, attribute = name.split(".")
    if module:  # without the host engine
        path = ROOT / package / f"{module[0]}.py"
        (text,) = (found.text for found in docstrings(path) if found.name == attribute)
    else:
        text = inspect.getdoc(getattr(import_module(f"trimtab.{package}"), attribute))
    found = [block for block in blocks(text) if block.language == "python"]
    # What needs an engine may say so.
    assert any(module == ["vllm"] or not block.why for block in found), "no example that runs"


class ShownOutput(doctest.OutputChecker):
    """What is shown has to be what is printed; where nothing is shown anything may be."""

    def check_output(self, want: str, got: str, flags: int) -> bool:
        return not want or super().check_output(want, got, flags)


EXAMPLES = [
    found for path in SOURCES for found in docstrings(path) if re.search(">>>|```", found.text)
]


@pytest.mark.parametrize("docstring", EXAMPLES, ids=str)
def test_an_example_prints_what_it_shows(docstring, names):
    assert docstring.text.count("\nExample:\n\n") == 1
    assert not re.search(">>>|```", BLOCK.sub("", docstring.text)), "`>>>` is not in a block"
    for block in blocks(docstring.text):
        if block.language != "python":
            continue
        place = name_of(docstring.path), docstring.line + block.line
        example = doctest.DocTestParser().get_doctest(block.code, names, docstring.name, *place)
        assert example.examples, "a block without `>>>`"
        if block.why:
            ast.parse("".join(statement.source for statement in example.examples))
            continue
        told: list[str] = []
        runner = doctest.DocTestRunner(ShownOutput(), False, doctest.ELLIPSIS)
        if runner.run(example, out=told.append).failed:
            pytest.fail("".join(told), pytrace=False)  # with the file and line of each


def test_the_tuners_configuration_is_one(tmp_path, monkeypatch):
    from trimtab.optimizers.tune.config import load

    monkeypatch.setenv("PROMETHEUS_TOKEN", "none")
    (block,) = (b for b in blocks((ROOT / "docs/tune.md").read_text()) if b.language == "yaml")
    (tmp_path / "tune.yaml").write_text(block.code)
    assert [knob.name for knob in load(tmp_path / "tune.yaml").knobs] == [
        "workers",
        "work_mem",
        "cpu",
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_files_are_there(page):
    text = page.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^    |`|\$ )make ([\w-]+)", text, re.MULTILINE):
        assert target in targets
    for command in re.findall(r"(?:^    |`|\$ |-m )trimtab ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS
    for path in re.findall(r"\b(?:benchmarks|examples|tests|docs)/[\w/-]+\.(?:py|yaml|md)\b", text):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@functools.cache
def messages() -> str:
    """All texts in the sources, a line each, with `…` for what is put into them."""
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    page = (ROOT / "docs/operate/troubleshooting.md").read_text()
    return [line.strip("` ") for line in re.findall(r"^### (.+)$", page, re.MULTILINE)]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_ours(message):
    if message == "KeyError: 'CONGO'":  # Nevergrad's
        return
    known = messages()
    assert len(quoted()) > 40
    # What follows the last "…" may be more of the message than is quoted.
    assert message.removesuffix("…").rstrip() in known


def test_what_the_readme_says_is_needed_is_what_is_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = re.findall(r"([\w-]+)>=([\d.]+)", json.dumps(extras["optional-dependencies"]))
    rows = re.findall(
        r"^\| ([\w, -]+) \| ([\d., ]+)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    told = {
        (name.strip().lower(), version.strip())
        for names, versions in rows
        for name, version in zip(names.split(","), versions.split(","))
    }
    for name in ("torch", "transformers", "vllm", "trl", "peft", "nevergrad"):
        assert (name, dict(needed)[name]) in told
    assert extras["requires-python"] == ">=3.11"
