"""Sampling in the workers of a Ray cluster of this machine."""

import inspect
import os
import subprocess
import sys
import textwrap

import pytest

from trimtab.trainers import collection, mavis_config
from trimtab.trainers.ray_sampler import RaySampler
from trimtab.trainers.samplers import TransformersSampler, VLLMSampler

from .conftest import ROOT
from .test_mavis_trainer import config, prompts, trainer
from .test_samplers import heads  # noqa: F401


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_ray_workers": 0}, "`num_ray_workers` must be at least 1, got 0"),
        ({"num_ray_workers": 2}, "num_ray_workers=2 .*: set `use_vllm`"),
        (
            {"num_ray_workers": 2, "use_vllm": True, "vllm_server_base_url": "http://localhost:1"},
            "leave out `vllm_server_base_url`",
        ),
    ],
)
def test_what_contradicts_ray_workers_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_missing_ray_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mavis_config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs ray: pip install 'trimtab\[ray\]'"):
        config(tmp_path, num_ray_workers=2, use_vllm=True)


def test_every_iteration_samples_in_the_workers(base_model, tmp_path, monkeypatch):
    made = []

    def sampler(num_workers, **kwargs):
        inspect.signature(RaySampler).bind(num_workers, **kwargs)
        del kwargs["model_init_kwargs"]
        inspect.signature(VLLMSampler).bind(**kwargs)
        made.append((num_workers, kwargs["value_models"]))
        shared = ("model", "config", "eos_token_ids", "value_models", "beta")
        return TransformersSampler(**{name: kwargs[name] for name in shared})

    monkeypatch.setattr(collection, "RaySampler", sampler)
    trainer(
        base_model, tmp_path, num_iterations=2, top_k=5, use_vllm=True, num_ray_workers=2,
        layers=1, num_train_epochs=1, eval_dataset=prompts(2, 8),
    ).train()  # fmt: skip
    folders = [[str(tmp_path / f"iteration-{i}" / "value_model")] for i in range(2)]
    assert made == [(2, []), (2, folders[0]), (2, folders[1])]


def run(script):
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:] + finished.stdout[-2000:]


def test_two_workers_of_which_one_is_killed_sample_the_trees_of_one_process(
    base_model,
    heads,  # noqa: F811
    tmp_path,
):
    """And go on to sample the guided policy; a worker of other weights is refused."""
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    run(
        f"""
        import os, signal
        from pathlib import Path
        import pytest, ray
        from tests.trainers.conftest import END, VOCABULARY, make_tokenizer
        from tests.trainers.test_rollouts import same
        from tests.trainers.test_samplers import BETA, GUIDED, check_guided
        from trimtab.trainers import ray_sampler
        from trimtab.trainers.ray_sampler import RaySampler
        from trimtab.trainers.rollouts import collect_rollouts, read_rollouts
        from trimtab.trainers.trees import TreeConfig
        from trimtab.trainers.samplers import VLLMSampler

        base, heads, folder = {base_model!r}, {heads!r}, Path({str(tmp_path)!r})
        tokenizer = make_tokenizer()
        prompts = [f"a b {{word}}" for word in VOCABULARY[4:]]
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        shape = TreeConfig(
            max_completion_length=12, layers=3, top_k=GUIDED.top_k, temperature=GUIDED.temperature
        )
        kwargs = dict(
            model=base, config=GUIDED, eos_token_ids={{END}}, max_model_len=64,
            value_models=[heads], beta=BETA, init_kwargs=dict(
                enforce_eager=True, dtype="float32", distributed_executor_backend="uni"
            ),
        )

        def collect(name, sampler):
            return collect_rollouts(
                folder / name, prompts, {{}}, tokenizer, prompt_ids, {{}}, shape, {{END}},
                lambda: sampler, {{}}, batch_size=5,
            )

        sampler = VLLMSampler(**kwargs)
        alone = collect("alone", sampler)
        sampler.close()

        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        fingerprint, ray_sampler.guidance_fingerprint = (
            ray_sampler.guidance_fingerprint, lambda folder: "here, not in the workers"
        )
        with pytest.raises(ValueError, match="Ray worker at .* has other weights at '"):
            RaySampler(1, **kwargs)
        ray_sampler.guidance_fingerprint = fingerprint

        warnings = []
        ray_sampler.logger.warning = warnings.append
        sampler = RaySampler(2, **kwargs)
        assert len(sampler.workers) == 2 and not warnings
        victim, lasting = sampler.workers
        get, answers = ray.get, 0

        def kill_one_after_a_while(*args, **options):
            global answers
            answers += 1
            if answers == 4:  # both are at work
                os.kill(int(victim.split("process ")[1]), signal.SIGKILL)
            return get(*args, **options)

        ray.get = kill_one_after_a_while
        shared = collect("shared", sampler)
        ray.get = get
        assert list(sampler.workers) == [lasting]
        assert len(warnings) == 1 and f"{{victim}} is left out" in warnings[0]
        same(shared, alone)
        same(read_rollouts(folder / "shared"), alone)
        assert [tree.prompt_index for tree in shared] == list(range(len(prompts)))

        check_guided(sampler, heads)
        os.kill(int(lasting.split("process ")[1]), signal.SIGKILL)
        with pytest.raises(ConnectionError, match="no Ray worker is left.*Run again"):
            sampler([[1]], [3], [1])
        sampler.close()
        assert ray.is_initialized(), "the cluster is not ours"
        """
    )
