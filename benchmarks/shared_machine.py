"""What a busy neighbour costs: the demo's sampling by vLLM on a CPU, alone and beside one process.

Threads that wait for each other spin, so that one that a neighbour holds up costs all the others
their cores. Each choice of threads and of how they wait samples the same trees of responses, in a
process of its own, alone and beside one that computes all the time; the arms take turns.

    python benchmarks/shared_machine.py    # half an hour; writes its JSON and a table
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORES = str(len(os.sched_getaffinity(0)))
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
FREE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ARMS = {
    "vLLM's own: a thread a core, bound, spinning": {},
    "a thread a core, bound, waiting asleep": PASSIVE,
    "a thread a core, free, waiting asleep": {**PASSIVE, **FREE, "OMP_NUM_THREADS": CORES},
    "one thread": {**FREE, "OMP_NUM_THREADS": "1"},
}
NEIGHBOUR = "while True: sum(range(10**6))"

SAMPLE = """
import json, sys, time
from trimtab.trainers import MAVISTrainer
from trimtab.trainers.cli import load_prompts, parse

script, args, model, _ = parse("train",
    ["--config", "examples/train_value_models.yaml", "--output_dir", sys.argv[1],
     "--rollout_dir", sys.argv[1]])
prompts = load_prompts(script)["train"].select(range(int(sys.argv[2])))
length = lambda completions, **columns: [float(len(c)) for c in completions]
trainer = MAVISTrainer(model.model_name_or_path, args, {"length": length}, prompts)
trainer._collection.make_sampler()  # the engine's start is not counted
start = time.perf_counter()
trainer.collect_rollouts()
print("SECONDS", time.perf_counter() - start)
"""


def sampling_seconds(arm: str, prompts: int, beside: bool) -> float:
    """Wall time of sampling, in seconds."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "VLLM"))
    }
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **ARMS[arm]}
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if beside else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(
                [sys.executable, "-c", SAMPLE, folder, str(prompts)],
                cwd=ROOT, env=environment, capture_output=True, text=True,
            )  # fmt: skip
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    if run.returncode:
        raise RuntimeError(f"{arm}: sampling failed\n{run.stdout}{run.stderr}")
    line = next(x for x in run.stdout.splitlines() if x.startswith("SECONDS "))
    return float(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], cwd=ROOT, check=True)
    seconds: dict[str, dict[str, list[float]]] = {arm: {"alone": [], "beside": []} for arm in ARMS}
    for _ in range(options.repetitions):
        for arm in ARMS:
            for place in ("alone", "beside"):
                taken = sampling_seconds(arm, options.prompts, place == "beside")
                seconds[arm][place].append(taken)
                print(f"{arm}, {place}: {taken:.0f} s", flush=True)
    first = statistics.median(seconds[next(iter(ARMS))]["alone"])
    lines = [
        "| threads | alone | beside a busy process | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for arm, taken in seconds.items():
        alone, beside = (statistics.median(taken[place]) / first for place in ("alone", "beside"))
        lines.append(f"| {arm} | {alone:.2f} | {beside:.2f} | {beside / alone:.1f} |")
    print("\n".join(lines))
    results = Path(__file__).parent / "results"
    content = {"cores": int(CORES), "prompts": options.prompts, "seconds": seconds}
    (results / "shared_machine.json").write_text(json.dumps(content, indent=1) + "\n")
    (results / "shared_machine.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
