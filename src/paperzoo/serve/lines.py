"""What the service and its model processes log: a line of JSON for each request and event, on the standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

FIELDS = ("request_id", "method", "path", "endpoint", "model", "status", "seconds", "bytes", "client", "error")


class Lines(logging.Formatter):
    """A record as one line of JSON; what it says beyond its message is in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line["message"] = record.getMessage()
        line |= {name: getattr(record, name) for name in FIELDS if getattr(record, name, None) is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log_lines(level: int = logging.INFO) -> None:
    """Everything that this process logs goes to the standard error, a line of JSON each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("paperzoo", "paperzoo.serve"):
        log = logging.getLogger(name)
        log.handlers.clear()
        log.setLevel(level)
