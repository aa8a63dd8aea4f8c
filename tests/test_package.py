"""The package as `pip install` leaves it, away from the clone."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import trimtab

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
        names = {path.name for path in (ROOT / package).glob("*.py")}
        assert names <= {path.name for path in (installed / "trimtab" / package).glob("*.py")}
