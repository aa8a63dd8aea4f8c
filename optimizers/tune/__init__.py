"""Tunes a running system by a configuration file: ``python -m trimtab.optimizers.tune tune.yaml``.

CONGO proposes points, this package applies them by commands, HTTP calls or Kubernetes patches,
measures the cost by PromQL, a command or an HTTP call, and puts the system back to the last good
point on a breach, on a failure, on exit and after a crash. ``docs/tune.md`` is its manual.
"""
