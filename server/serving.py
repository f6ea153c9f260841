"""One server process: an address to listen on, uvicorn around the application, signals.

SIGTERM and SIGINT stop the taking of jobs, end event streams, hand running jobs back to the queue and end the workers, all within
ten seconds. The exit code is then 0 for SIGTERM and 130 for SIGINT.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from selfpruner.errors import ConfigError, disk_errors
from selfpruner.files import cache_folder, places
from selfpruner.store.store import Store
from selfpruner.workers import devices
from server.app import create_app
from server.runner import Runner
from server.settings import ServerSettings

log = logging.getLogger("selfpruner.server")


class _Server(uvicorn.Server):
    """uvicorn, except that a signal ends in an exit code instead of being raised again, and that jobs and streams are stopped
    before connections are waited for: an open event stream would otherwise hold the server for ever."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._ready = ready
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.interrupted = sig == signal.SIGINT
        self.force_exit = self.should_exit and self.interrupted
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping: running jobs go back to the queue")
        for server in self.servers:
            server.close()
        runner: Runner = self._app.state.runner
        await runner.stop()
        await super().shutdown(sockets)


def serve(settings: ServerSettings, ready: Callable[[str], None]) -> int:
    """Serve until a signal; returns the exit code. ``ready`` is called with the base URL once requests are answered.

    Raises ConfigError when a device, the address or the home folder cannot be had, StoreError when another server owns the home
    folder.
    """
    if settings.ray is None:
        devices.check_here(settings.devices)
    cache_folder.limit()  # or every job would find that it is no size
    places.writable_folder(settings.home, param="home")
    for folder in (settings.home, settings.cache, settings.checkpoints, settings.logs):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = _listen(settings.host, settings.port)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{name}:{listener.getsockname()[1]}"
    with listener, Store(settings.database) as store:
        app = create_app(settings, store)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        server = _Server(config, app, lambda: ready(url))
        server.run(sockets=[listener])
        return 130 if server.interrupted else 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --port (0 takes a free one).",
            param="port",
        ) from error
    return listener
