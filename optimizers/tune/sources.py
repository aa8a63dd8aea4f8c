"""Where the cost and the SLO's value come from."""

from __future__ import annotations

import json
import math
import typing as tp

import httpx

from .commands import Failed, Stop, run, send
from .config import Config, Source


def measure(source: Source, config: Config, stop: Stop | None = None) -> float:
    """The number that a source gives now.

    Raises:
        Failed: no number, and why.
        Stopped: ``stop`` was told.
    """
    if source.promql is not None:
        return _query(source.promql.replace("{window}", f"{config.window:g}s"), config)
    if source.command is not None:
        return _number(run(source.command, config.timeout, stop), " ".join(source.command))
    assert source.http is not None
    answer: tp.Any = send(source.http, config.timeout)
    if source.value is not None:
        try:
            answer = json.loads(answer)
            for key in source.value.split("."):
                answer = answer[int(key) if isinstance(answer, list) else key]
        except (ValueError, KeyError, IndexError, TypeError):
            raise Failed(
                f"{source.http.url}: no {source.value!r} in {str(answer)!r:.200}"
            ) from None
    return _number(answer, source.http.url)


def _number(given: tp.Any, where: str) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(given, bool) or not math.isfinite(number):
        raise Failed(f"{where}: {given!r:.200} is not a finite number")
    return number


def _query(promql: str, config: Config) -> float:
    assert config.prometheus is not None
    url = config.prometheus.url.rstrip("/") + "/api/v1/query"
    try:
        answer = httpx.post(
            url,
            data={"query": promql},
            headers=config.prometheus.headers,
            timeout=config.timeout,
        )
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise Failed(f"prometheus.url {config.prometheus.url}: {type(e).__name__}: {e}") from None
    except ValueError:
        raise Failed(
            f"prometheus.url {config.prometheus.url}: status {answer.status_code} and no JSON: "
            "is it the address of a Prometheus server?"
        ) from None
    if not isinstance(content, dict) or content.get("status") != "success":
        told = content.get("error") if isinstance(content, dict) else content
        raise Failed(f"promql {promql!r}: {told!s:.300}")
    kind, result = content["data"]["resultType"], content["data"]["result"]
    if kind == "scalar":
        return _number(result[1], f"promql {promql!r}")
    if kind != "vector":
        raise Failed(f"promql {promql!r} gives a {kind}: it must give one value, as rate() does")
    if not result:
        raise Failed(
            f"promql {promql!r} gives nothing: is it scraped, and twice within the window?"
        )
    if len(result) > 1:
        raise Failed(
            f"promql {promql!r} gives {len(result)} series: aggregate, as by sum() or max()"
        )
    return _number(result[0]["value"][1], f"promql {promql!r}")
