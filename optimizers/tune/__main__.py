"""``python -m trimtab.optimizers.tune tune.yaml``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import typing as tp

try:
    from .commands import Failed, Stop
    from .config import ConfigError, load
    from .loop import Status, Tuner
    from .metrics import Exporter, View
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'trimtab[tune]'")


def main(arguments: list[str] | None = None) -> int:
    """Runs the tuner.

    Returns:
        0 when it ended or was told to end and the system is at the last good point, 1 when the
        system could not be put back there, 2 when the configuration cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trimtab.optimizers.tune", description="Tunes a running system."
    )
    parser.add_argument("config", help="YAML file, see docs/tune.md")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the first round, change nothing",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.tell)
    shown: list[tp.Any] = []

    def observe(status: Status) -> None:
        for each in shown:
            each(status)

    try:
        config = load(options.config)
        tuner = Tuner(config, stop, observe)
        if options.dry_run:
            print("\n".join(tuner.dry_run()))
            return 0
        if config.metrics is not None:
            shown.append(Exporter(config))
        if sys.stdout.isatty():
            shown.append(View(config))
        return 0 if tuner.run() else 1
    except (ConfigError, Failed) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    finally:
        for each in shown:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
