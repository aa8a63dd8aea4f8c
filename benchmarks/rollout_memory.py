"""Memory that training takes of 1, 10 and 100 times the demo's rollouts.

    python benchmarks/rollout_memory.py            # after `make demo`
    python benchmarks/rollout_memory.py --times 1 10

The demo's rollouts stand for more of them: their files are linked under further names, hidden
states too. A process of its own packs them as `MAVISTrainer` does before it trains, and takes 20
steps. What counts is anonymous memory: pages of mapped files are the system's to take back. Writes
`benchmarks/results/rollout_memory.json`, in which other multiples are kept, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OBJECTIVES = ["positivity", "relevance", "readability", "rarity"]
STEPS = 20


def multiply(folder: Path, times: int, out: Path) -> None:
    """Links a folder's rollouts and hidden states under so many names."""
    for number in range(times):
        for path in [*folder.glob("trees-*.parquet"), *folder.glob("trees-*.hidden.safetensors")]:
            os.link(path, out / path.name.replace("trees-", f"trees-{number:03d}-"))
    os.link(folder / "embedding.hidden.safetensors", out / "embedding.hidden.safetensors")


class Watch(threading.Thread):
    """The largest anonymous memory of this process, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            kilobytes = int(status.split("RssAnon:")[1].split()[0])
            self.most = max(self.most, 1024 * kilobytes)
            time.sleep(0.02)


def train(args: argparse.Namespace) -> None:
    """Packs and trains in this process; prints the memory before and at most."""
    from datasets import Dataset

    from trimtab.trainers import MAVISConfig, MAVISTrainer, read_rollouts

    with tempfile.TemporaryDirectory() as scratch:
        trainer = MAVISTrainer(
            str(args.base),
            MAVISConfig(
                scratch, rollout_dir=str(args.folder.parent), head_type=args.head_type, layers=3,
                max_completion_length=48, max_steps=STEPS, save_strategy="no", report_to="none",
            ),
            {name: lambda completions, **_: [0.0] * len(completions) for name in OBJECTIVES},
            Dataset.from_dict({"prompt": ["any"] * 8}),
        )  # fmt: skip
        watch = Watch()
        watch.start()
        time.sleep(0.1)
        before, began = watch.most, time.monotonic()
        # All are there.
        trainer._collection.collect = lambda name, state: read_rollouts(args.folder)
        trainer.train()
        count = len(trainer._iterations.trees)
        print(json.dumps([count, before, watch.most, time.monotonic() - began]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("artifacts/smollm2"))
    parser.add_argument("--rollouts", type=Path, default=Path("artifacts/rollouts"))
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--head_type", choices=["hidden", "state"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        train(args)
        return
    out = ROOT / "benchmarks/results/rollout_memory.json"
    runs: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    runs = [run for run in runs if run["times"] not in args.times]
    for head_type in ("hidden", "state"):
        for times in args.times:
            with tempfile.TemporaryDirectory(dir=args.rollouts) as scratch:
                folder = Path(scratch) / "train"
                folder.mkdir()
                multiply(args.rollouts / "train", times, folder)
                command = [
                    sys.executable, __file__, "--base", args.base, "--head_type", head_type,
                    "--folder", folder,
                ]  # fmt: skip
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            trees, before, most, seconds = json.loads(done.stdout.splitlines()[-1])
            runs.append(
                {"head_type": head_type, "times": times, "trees": trees,
                 "before_gib": before / 2**30, "peak_gib": most / 2**30, "seconds": seconds}
            )  # fmt: skip
            print(runs[-1], flush=True)
    runs.sort(key=lambda run: (run["head_type"], run["times"]))
    out.write_text(json.dumps(runs, indent=1) + "\n")
    lines = ["| head | trees | peak anonymous memory, GiB | before it, GiB |", "| --- " * 4 + "|"]
    lines += [
        "| {head_type} | {trees} | {peak_gib:.2f} | {before_gib:.2f} |".format(**run)
        for run in runs
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
