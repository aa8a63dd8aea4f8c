"""The package as `pip install` leaves it, away from the clone."""

import ast
import json
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import trimtab
from tests.conftest import make_base_model
from trimtab.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the built wheel is installed into; the dependencies stay where they are."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(
        ROOT,
        folder / "source",
        ignore=lambda path, names: (
            [n for n in names if n.startswith(".")]
            + (["artifacts", "build"] if Path(path) == ROOT else [])
        ),
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def run(installed, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_version_is_that_of_the_metadata():
    assert trimtab.__version__ == version("trimtab")


def test_wheel_holds_all_subpackages(installed, tmp_path):
    # A folder of the package's name in the working directory, such as a clone's, hides nothing.
    (tmp_path / "trimtab" / "plugins").mkdir(parents=True)
    code = (
        "import trimtab.plugins, trimtab.trainers, trimtab.optimizers.tune\n"
        "print(*trimtab.__path__, trimtab.plugins.__file__, trimtab.__version__)"
    )
    finished = run(installed, tmp_path, sys.executable, "-c", code)
    folder, file, number = finished.stdout.split()
    assert folder == str(installed / "trimtab") and file.startswith(folder), finished.stderr
    assert number == trimtab.__version__
    for package in ("plugins", "trainers", "optimizers"):
        held = installed / "trimtab" / package
        for path in (ROOT / package).rglob("*.py"):
            assert (held / path.relative_to(ROOT / package)).exists(), path


def imports(path):
    """Modules of its own package that a module imports relatively, at whatever time, as paths."""
    found, later = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            later |= set(ast.walk(node))
        if isinstance(node, ast.ImportFrom) and node.level and node not in later:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in (folder, *(folder / alias.name for alias in node.names)):
                if target.with_suffix(".py").exists():
                    found.add(target.with_suffix(".py"))
    return found


@pytest.mark.parametrize("package", ["plugins", "trainers", "optimizers"])
def test_modules_import_each_other_in_no_circle(package):
    graph = {path: imports(path) for path in (ROOT / package).rglob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # a circle raises
    assert set(graph) == set(order) and any(graph.values())


def test_wheel_trains_from_twenty_rows(installed, tmp_path):
    base = make_base_model(tmp_path / "base")
    rows = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(3, 23)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "my_rewards.py").write_text(
        "def early(completions, **kwargs):\n"
        "    return [float(sum(int(w[1:]) < 50 for w in c.split() if w[0] == 'w'))"
        " for c in completions]\n"
    )
    command = [
        installed / "bin" / "trimtab", "train",
        "--model_name_or_path", base, "--dataset_name", "prompts.jsonl",
        "--reward_funcs", "early=my_rewards:early", "--output_dir", "value_model",
        "--head_type", "hidden", "--max_completion_length", "8", "--layers", "2",
        "--num_train_epochs", "1", "--report_to", "none",
    ]  # fmt: skip
    finished = run(installed, tmp_path, *command)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for asked in (["inspect", "value_model"], ["check", base, "value_model"]):
        finished = run(installed, tmp_path, installed / "bin" / "trimtab", *asked)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "value_model" in finished.stdout


@pytest.mark.parametrize(
    "command", ["", "train", "rollouts", "evaluate", "inspect", "check", "serve", "playground"]
)
def test_help_fits_a_screen_and_imports_nothing_heavy(command):
    code = (
        "import sys\n"
        "from trimtab.__main__ import main\n"
        "try:\n    main([x for x in sys.argv[1:] if x])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'vllm', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    asked = [sys.executable, "-c", code, command, "--help"]
    finished = subprocess.run(
        asked, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert f"trimtab {command}".strip() in lines[0]
    assert len(lines) <= 24 and max(map(len, lines)) <= 100


def test_unknown_command_is_named(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian', give one of train, " in capsys.readouterr().err


def test_missing_dependency_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["train", "--output_dir", "x"]) == 2
    assert "it needs trl; pip install 'trimtab[trl]'" in capsys.readouterr().err


def test_what_only_an_option_needs_is_named(capsys, monkeypatch):
    from trimtab.plugins import cli

    error = ModuleNotFoundError("this option needs openai; pip install openai", name="openai")
    monkeypatch.setattr(cli, "inspect", lambda arguments: (_ for _ in ()).throw(error))
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == f"trimtab inspect: error: {error}\n"
