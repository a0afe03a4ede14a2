"""Logs: one line each, as JSON or text, with the ids of the request where there is one. Never text of prompts or
answers."""

from __future__ import annotations

import json
import logging
import sys
import time

from cluster.telemetry.records import RequestRecord

requests = logging.getLogger("cluster.requests")
_FIELDS = ("trace_id", "request_id", "group")


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message; ids and an exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        found: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        found |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        found |= getattr(record, "figures", {})
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=True, default=str)


class TextLines(logging.Formatter):
    """The same for people. Line breaks in messages are shown, not made."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line = super().format(record).replace("\n", "\\n")
        extra = {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        extra |= getattr(record, "figures", {})
        return line + "".join(f" {name}={value}" for name, value in extra.items())


def set_up(level: str, form: str) -> None:
    """Logs of this package go to standard error, which Ray keeps for each process. May be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger("cluster")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def log_request(record: RequestRecord) -> None:
    """The line of a request that is over: how it ended and what it took, by figures only."""
    level = logging.WARNING if record.error_code and record.error_code != "CANCELLED" else logging.INFO
    if not requests.isEnabledFor(level):
        return
    account = record.account
    figures: dict[str, object] = {
        "code": record.error_code or "OK",
        "finish": record.finish_reason,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "seconds": round(record.wall_s, 6),
        "unattributed_s": round(record.unattributed_s, 6),
    }
    if account is not None and account.first_token_s is not None:
        figures["first_token_s"] = round(account.first_token_s - record.arrived_s, 6)
    ids = {"trace_id": record.ref.trace_id, "request_id": record.request_id}
    requests.log(level, "request ended", extra={**ids, "figures": figures})
