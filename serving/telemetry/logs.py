"""Logs of every process: one line of text or one JSON object per record, on standard output.

Knows no request and no prompt: who logs one of those has a bug. The only module that configures logging.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 1,
}
NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}  # the words of TGI's logs
OURS = "serving"
PREFIXES_OF_TGI = "text_generation"  # text_generation_launcher, text_generation_router, ...


class TextFormatter(logging.Formatter):
    """`2026-11-21T09:00:00.000000Z  INFO serving.worker: Ready`, then its fields, or a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {_level(record):>5} {record.name}: {_one_line(record.getMessage())}"
        line += "".join(f" {name}={_value(value)}" for name, value in _fields(record).items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JSONFormatter(logging.Formatter):
    """One flat JSON object, with TGI's keys, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _timestamp(record),
            "level": _level(record),
            "message": record.getMessage(),
            "target": record.name,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str, *, json_output: bool) -> None:
    """Send all logs to standard output.

    Args:
        level: a level's name, or TGI's directives such as "text_generation_router=debug,info": the level for this
            project's records. gunicorn's own are shown from warnings up, below that only at debug level, like those
            of every other library.
    """
    ours = parse_level(level)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JSONFormatter() if json_output else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(ours, logging.WARNING))
    logging.getLogger(OURS).setLevel(ours)
    if ours <= logging.DEBUG:
        logging.getLogger("gunicorn").setLevel(logging.INFO)
    logging.captureWarnings(True)


def adopt(library: str) -> None:
    """Have a library's records go where all go; some bring a handler of their own when they are imported."""
    logging.getLogger(library).handlers.clear()


def parse_level(directives: str) -> int:
    """The number of the level that `directives` give this project's records; info where they do not say."""
    found = {"": logging.INFO}
    for target, level in _directives(directives):
        if target in ("", OURS) or target.startswith(PREFIXES_OF_TGI):
            found[target and OURS] = level
    return found.get(OURS, found[""])


def _directives(text: str) -> Iterator[tuple[str, int]]:
    for part in text.lower().split(","):
        target, _, name = part.strip().rpartition("=")
        if name in LEVELS:
            yield target, LEVELS[name]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was logged with `extra={"fields": ...}`."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _level(record: logging.LogRecord) -> str:
    return NAMES.get(record.levelno, record.levelname)


def _value(value: Any) -> str:
    """A field's value, in quotes where it could be taken for more than one: some are what a client said."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"=]', text) else text


def _one_line(message: str) -> str:
    return message.replace("\r", "\\r").replace("\n", "\\n")
