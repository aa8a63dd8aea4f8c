"""The list of what is read of vLLM, against the vLLM that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.vllm_sources import missing

vllm = pytest.importorskip("vllm")


@pytest.mark.parametrize(
    ("file", "before", "after", "found"),
    [
        (None, "", "", []),
        ("config/__init__.py", "VllmConfig", "Config", ["VllmConfig of vllm.config, which"]),
        ("config/scheduler.py", "max_num_seqs", "max_seqs", ["SchedulerConfig.max_num_seqs of"]),
        (
            "model_executor/layers/logits_processor.py",
            "hidden_states: torch",
            "hidden: torch",
            ["LogitsProcessor.forward(self, lm_head, hidden_states) of"],
        ),
        (
            "v1/worker/gpu_model_runner.py",
            "class GPUModelRunner",
            "class ModelRunner",
            ["GPUModelRunner.discard_request_mask of", "GPUModelRunner.optimistic_seq_lens_cpu of"],
        ),
    ],
)
def test_what_a_release_has_renamed_is_found(file, before, after, found):
    def read(name):
        path = Path(vllm.__file__).parent / name
        text = path.read_text() if path.is_file() else ""
        assert name != file or before in text
        return text.replace(before, after) if name == file else text

    gone = sorted(set(missing(read)))
    starts = [text for text in found if any(line.startswith(text) for line in gone)]
    assert starts == found and bool(gone) == bool(found)
