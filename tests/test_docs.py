"""README and docs: their Python runs, and their commands, links and messages are what there is."""

from __future__ import annotations

import ast
import functools
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import make_base_model, make_heads, make_value_model
from trimtab.__main__ import COMMANDS

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
# Where messages to users are raised
SOURCES = [
    path for name in ("plugins", "trainers", "optimizers") for path in (ROOT / name).rglob("*.py")
]


@dataclass
class Block:
    """A fenced block, with the output that is shown under it."""

    language: str
    code: str
    why: str | None
    line: int
    output: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
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
    found = list(blocks(page))
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
    state = make_value_model(folder / "state", base, objectives)
    return SimpleNamespace(base=base, heads=heads, state=state)


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

    from trimtab.trainers import MAVISConfig, MAVISTrainer

    monkeypatch.chdir(tmp_path)
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


RUN = [page for page in PAGES if any(b.language == "python" and not b.why for b in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_python_runs_and_prints_what_is_shown(page, names, capsys):
    for block in blocks(page):
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


def test_the_tuners_configuration_is_one(tmp_path, monkeypatch):
    from trimtab.optimizers.tune.config import load

    monkeypatch.setenv("PROMETHEUS_TOKEN", "none")
    (block,) = (b for b in blocks(ROOT / "docs/tune.md") if b.language == "yaml")
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
