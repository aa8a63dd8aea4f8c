"""What the plugin does in a vLLM that has moved what it never promised."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")
from trimtab.plugins import vllm_internals

# Of which vLLM's documentation of custom logits processors and endpoint plugins tells
PROMISED = {
    "vllm", "vllm.config", "vllm.engine.protocol", "vllm.sampling_params", "vllm.tokenizers",
    "vllm.v1.sample.logits_processor", "vllm.v1.sample.logits_processor.builtin",
    "vllm.v1.worker.gpu.sample.logits_processor",
}  # fmt: skip


@pytest.fixture
def said(monkeypatch):
    """What is warned of, as text."""
    texts: list[str] = []
    monkeypatch.setattr(
        vllm_internals.logger, "warning_once", lambda text, *args: texts.append(text % args)
    )
    return texts


def test_no_other_file_reads_what_vllm_does_not_promise():
    folder = Path(vllm_internals.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name == "vllm_internals.py":
            continue
        text = path.read_text()
        assert "_getframe" not in text, path
        nodes = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.ImportFrom)]
        imported = {x.module for x in nodes if not x.level and x.module}
        assert {name for name in imported if name.split(".")[0] == "vllm"} <= PROMISED, path


def test_a_frontend_without_a_configuration_is_named(said):
    from vllm import SamplingParams

    from trimtab.plugins.vllm import MAVISLogitsProcessor

    MAVISLogitsProcessor.validate_params(SamplingParams(extra_args={"mavis_weights": "x=1"}))
    (text,) = said
    assert "an unknown objective goes on unguided; install vLLM 0.32" in text


def test_a_runner_that_shows_no_chunks_is_named(said):
    class GPUModelRunner:
        def __init__(self, **shown):
            vars(self).update(shown)
            self.read = vllm_internals.ModelRunner()

    rows = np.array([2, 0])
    runner = GPUModelRunner()
    thrown_away, computed = runner.read.partial(rows)
    assert not thrown_away.any() and not computed.any()
    assert "changes no answer; install vLLM 0.32" in said[0]
    lengths = SimpleNamespace(numpy=lambda: np.array([7, 8, 9]))
    mask = SimpleNamespace(np=np.array([True, False, False]))
    runner = GPUModelRunner(discard_request_mask=mask, optimistic_seq_lens_cpu=lengths)
    thrown_away, computed = runner.read.partial(rows)
    assert thrown_away.tolist() == [False, True] and computed.tolist() == [9, 7]
    assert len(said) == 1


def test_heads_do_not_start_where_the_output_layer_reads_something_else(monkeypatch):
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def forward(self, hidden_states):
        return hidden_states

    monkeypatch.setattr(LogitsProcessor, "forward", forward)
    with pytest.raises(ValueError, match=r"\['self', 'hidden_states'\]: install vLLM 0.32"):
        vllm_internals.watch_vllm()
    assert LogitsProcessor.forward is forward
