"""The application: the parts of the server, put together. Imports no torch, and nothing that does.

Starting it queues again what a dead server left running; stopping it hands running jobs back. Tests pass their own search and
worker pool, and so run a server around scripted ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

import anyio.to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from selfpruner.jobs.lifecycle import RunJob
from selfpruner.store.store import Store
from server import errors
from server.middleware import BodyGuard, RequestContext
from server.notifications import News
from server.routes import candidates, checkpoints, events, health, jobs, models
from server.runner import PoolFactory, Runner, default_pool, default_run_job
from server.settings import ServerSettings

# Requests read the database in threads; each thread may hold a connection with its page cache.
THREADS = 8


def create_app(
    settings: ServerSettings, store: Store, *, run_job: RunJob | None = None, pool_factory: PoolFactory = default_pool
) -> FastAPI:
    """The server for ``settings`` around an open ``store``, which stays the caller's to close."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        news = News(asyncio.get_running_loop())
        store.on_event = news.publish
        runner = Runner(store, settings, run_job=run_job or default_run_job(), pool=pool_factory(settings))
        app.state.store, app.state.runner, app.state.news = store, runner, news
        await runner.start()
        try:
            yield
        finally:
            await runner.stop()

    app = FastAPI(
        title="selfpruner",
        version=metadata.version("selfpruner"),
        description="Search for the best way to prune a language model without retraining, over HTTP.",
        lifespan=lifespan,
        docs_url=None,  # the bundled pages load scripts from a CDN
        redoc_url=None,
    )
    app.state.settings = settings
    for route in (health, jobs, events, candidates, checkpoints, models):
        app.include_router(route.router)
    errors.register(app)
    app.add_middleware(BodyGuard, settings=settings)
    app.add_middleware(RequestContext)

    def openapi() -> dict[str, object]:
        """FastAPI documents validation errors in its own shape; ours is the one that is sent."""
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for name in ("HTTPValidationError", "ValidationError"):
                schema.get("components", {}).get("schemas", {}).pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to change it
    return app
