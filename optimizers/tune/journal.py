"""What survives a kill: the log from which a run is rebuilt, and the log of every change.

Both are JSON lines, appended and synced one by one; nothing is ever rewritten.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import typing as tp

from .config import ConfigError


class Lines:
    """A file of JSON lines that this process alone appends to.

    A last line without an end is what a kill leaves of one being written: it is cut off.

    Attributes:
        found: the lines that were there.

    Raises:
        ConfigError: another process holds the file, it cannot be written, or is no such file.
    """

    def __init__(self, path: str, field: str, read: bool) -> None:
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{field} is {path!r}: another tuner uses it: stop that one"
            ) from None
        except OSError as e:
            raise ConfigError(f"{field} is {path!r}: cannot be written: {e.strerror}") from None
        self._file.seek(0)
        whole = self._file.read()
        lines = whole.split(b"\n")
        if torn := lines.pop():
            self._file.truncate(len(whole) - len(torn))
        self.found: list[dict[str, tp.Any]] = []
        for number, line in enumerate(lines if read else [], 1):
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise ConfigError(
                    f"{field} is {path!r}: line {number} is no JSON object: move the file away to "
                    "start afresh"
                )
            self.found.append(content)

    def append(self, **line: tp.Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now, **line}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: tp.Any) -> None:
        self._file.close()
