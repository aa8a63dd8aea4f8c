import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_is_light():
    code = (
        "import sys, trimtab.trainers\n"
        "heavy = {'torch', 'transformers', 'trl', 'vllm', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    finished = run(code)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("missing", ["accelerate", "pyarrow"])
def test_missing_dependency_names_the_extra(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import trimtab.trainers as t\n"
        "t.read_rollouts if 'pyarrow' in sys.modules else t.MAVISTrainer"
    )
    finished = run(code)
    assert "pip install 'trimtab[trl]'" in finished.stderr and missing in finished.stderr


def test_exports_are_what_they_say():
    import trimtab.trainers as trainers

    for name in trainers.__all__:
        assert getattr(trainers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        trainers.Nothing  # noqa: B018
