"""Logging set-up: one JSON object per line for Cloud Logging, readable lines elsewhere.

Fields given as `extra={...}` to a log call are kept: as keys in JSON, as `key=value` in text.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_SEVERITY = {"WARN": "WARNING", "FATAL": "CRITICAL"}


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the log call gave as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """Cloud Logging's structured format: severity, message, time and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        entry = {
            "severity": _SEVERITY.get(record.levelname, record.levelname),
            "message": message,
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "logger": record.name,
            **extra_fields(record),
        }
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`12:30:01 INFO    pool: loaded seconds=4.2 model=my-model`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        line = super().formatMessage(record)
        fields = " ".join(f"{key}={value}" for key, value in extra_fields(record).items())
        return f"{line}  {fields}" if fields else line


def configure_logs(log_format: str, level: str) -> None:
    """Send every log record of this process to stdout, as `json`, `text` or what suits (`auto`)."""
    as_json = log_format == "json" or (log_format == "auto" and "K_SERVICE" in os.environ)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("uvicorn.error", "google", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.root.level))
