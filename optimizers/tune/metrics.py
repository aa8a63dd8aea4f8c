"""What the tuner shows of itself: Prometheus metrics and a view in the terminal."""

from __future__ import annotations

import typing as tp

from .commands import text
from .config import Config, ConfigError, Knob, Value
from .loop import Status


def _number(knob: Knob, value: Value) -> float:
    """A knob's value in a metric; of a choice, its place in the list."""
    return float(knob.choices.index(value)) if knob.choices is not None else float(value)


class Exporter:
    """Serves ``trimtab_tune_*``.

    Raises:
        ConfigError: the port cannot be served.
    """

    def __init__(self, config: Config) -> None:
        import prometheus_client
        from prometheus_client import core

        assert config.metrics is not None
        self._knobs = config.knobs
        self._status = Status()
        registry = core.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = prometheus_client.start_http_server(
                config.metrics.port, config.metrics.address, registry
            )
        except OSError as e:
            raise ConfigError(
                f"metrics is {config.metrics.address}:{config.metrics.port}: cannot listen there: "
                f"{e.strerror}: choose another port"
            ) from None

    def __call__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> tp.Iterator[tp.Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status
        for name, documentation, value in (
            ("cost", "The last cost measured.", status.cost),
            ("recommended_cost", "The cost at the recommendation.", status.recommended),
            ("outage", "1 while even the last good point fails.", float(status.outage)),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"trimtab_tune_{name}", documentation, value=value)
        for name, documentation, count in (
            ("rounds", "Rounds completed.", status.rounds),
            ("rollbacks", "Times that the system was put back.", status.rollbacks),
        ):
            yield CounterMetricFamily(f"trimtab_tune_{name}", documentation, value=count)
        evaluations = CounterMetricFamily(
            "trimtab_tune_evaluations", "Points measured.", labels=["outcome"]
        )
        for outcome, count in dict(status.outcomes).items():
            evaluations.add_metric([outcome], count)
        yield evaluations
        gauge = GaugeMetricFamily(
            "trimtab_tune_knob",
            "Values applied now and at the last good point; of a choice, its place in the list.",
            labels=["knob", "point"],
        )
        for point, values in (("now", dict(status.now)), ("good", dict(status.good))):
            for knob in self._knobs:
                if knob.name in values:
                    gauge.add_metric([knob.name, point], _number(knob, values[knob.name]))
        yield gauge

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class View:
    """A table in the terminal, redrawn in place."""

    def __init__(self, config: Config) -> None:
        from rich.live import Live

        self._knobs = config.knobs
        self._live = Live(auto_refresh=False)
        self._live.start()

    def __call__(self, status: Status) -> None:
        self._live.update(self._table(status), refresh=True)

    def _table(self, status: Status) -> tp.Any:
        from rich.table import Table

        counts = ", ".join(f"{count} {outcome}" for outcome, count in status.outcomes.items())
        costs = (status.cost, status.recommended)
        last, recommended = ("none" if c is None else f"{c:.6g}" for c in costs)
        table = Table(
            "knob", "now", "last good", "range",
            title=f"{status.phase}: {counts}; {status.rounds} rounds, {status.rollbacks} rollbacks",
            caption=f"cost {last}, recommended {recommended}" + ", OUTAGE" * status.outage,
        )  # fmt: skip
        for knob in self._knobs:
            ends = f"{knob.low:g} … {knob.high:g}" if knob.numeric else ""
            shown = (
                text(point[knob.name]) if knob.name in point else "?"
                for point in (status.now, status.good)
            )
            table.add_row(knob.name, *shown, ends)
        return table

    def close(self) -> None:
        self._live.stop()
