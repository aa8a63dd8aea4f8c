"""Commands and HTTP calls: what reaches the system, and a stop that waits can be woken by."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import typing as tp

import httpx

from .config import Request


class Failed(Exception):
    """A command, a request or a measurement did not succeed."""


class Stopped(Exception):
    """The tuner was told to end while it waited."""


class Stop:
    """Told once, by a signal; then every wait ends with ``Stopped``."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def tell(self, *_: tp.Any) -> None:
        self._event.set()

    @property
    def told(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        if self.told:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleeps.

        Raises:
            Stopped: at once when told.
        """
        if self._event.wait(seconds):
            raise Stopped


def run(argv: tp.Sequence[str], timeout: float, stop: Stop | None = None) -> str:
    """The output of a command, stripped.

    Args:
        argv: program and arguments; no shell.
        timeout: seconds after which it is killed, with all that it started.
        stop: kills it too; None for a command that must not be cut short.

    Raises:
        Failed: it could not start, took too long or did not exit with 0.
        Stopped: ``stop`` was told.
    """
    shown = " ".join(argv)
    # Files and not pipes: a server that the command leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            # A group of its own: Ctrl-C in the terminal must not cut a change in half.
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as e:
            raise Failed(f"command {shown!r} cannot start: {e.strerror}") from None
        end = time.monotonic() + timeout
        while True:
            try:
                process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                late = time.monotonic() > end
                if late or (stop is not None and stop.told):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    if late:
                        raise Failed(
                            f"command {shown!r} took more than timeout ({timeout:g} s)"
                        ) from None
                    raise Stopped from None
        out.seek(0)
        err.seek(0)
        if process.returncode:
            last = err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"command {shown!r} exited with {process.returncode}: {''.join(last)}")
        return out.read().decode(errors="replace").strip()


def send(request: Request, timeout: float) -> str:
    """The answer to a request.

    Raises:
        Failed: nobody answered within ``timeout`` seconds, or the status is not of 200 to 299.
    """
    shown = f"{request.method} {request.url}"
    try:
        answer = httpx.request(
            request.method,
            request.url,
            json=request.body,
            headers=request.headers,
            timeout=timeout,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise Failed(f"{shown}: {type(e).__name__}: {e}") from None
    if not answer.is_success:
        raise Failed(f"{shown}: status {answer.status_code}: {answer.text.strip()[:200]}")
    return answer.text


def fill(template: tp.Any, name: str, value: tp.Any) -> tp.Any:
    """A template (string, list or dict) with ``{name}`` and ``{value}`` in its strings replaced."""
    if isinstance(template, str):
        if template == "{value}":
            return value
        return template.replace("{name}", name).replace("{value}", text(value))
    if isinstance(template, list):
        return [fill(part, name, value) for part in template]
    if isinstance(template, dict):
        return {key: fill(part, name, value) for key, part in template.items()}
    return template


def text(value: tp.Any) -> str:
    """A knob's value in a command or an address: ``true``, ``12``, ``0.25``, ``lz4``."""
    return value if isinstance(value, str) else json.dumps(value)
