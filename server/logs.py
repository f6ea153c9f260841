"""Logs: one JSON object per line on stderr (readable text on a terminal), with the request or job that the line belongs to.

Control characters never reach the terminal: JSON escapes them, and so does the text form.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

# What the current task works for: a request id or a job id.
request_id: ContextVar[str] = ContextVar("request_id", default="")
job_id: ContextVar[str] = ContextVar("job_id", default="")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request_id"] = request
        if job := job_id.get():
            line["job_id"] = job
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        owner = job_id.get() or request_id.get()
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.getMessage())
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {owner + ' ' if owner else ''}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # One line per request of our own, with its id, is enough; the HTTP clients' would hold full URLs.
    for name in ("httpx", "httpx2", "httpcore", "openai", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
