"""A pool of workers on the nodes of a Ray cluster.

Queue, retries and cancelling are those of :class:`~selfpruner.workers.process_pool.ProcessPool`; here a worker is started by an
actor on some node (:mod:`selfpruner.workers.ray_relay`). Nodes may join and leave while jobs run: a new node's workers take tasks
at once, a lost one's tasks go to the others. What one node has computed for a session, the others get from it as bytes where they
do not find it in a common cache folder, and a checkpoint comes to this machine the same way.

This machine has to be a node of the cluster itself (``ray start --address=...``). Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner.errors import ConfigError, ModelNotFoundError, WorkerError
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session
from selfpruner.workers.process_pool import DeviceGoneError, ProcessPool, Slot
from selfpruner.workers.ray_relay import Relay, write_file
from selfpruner.workers.tasks import (
    BeginRequest,
    ExportRequest,
    MakeRequest,
    PrepareRequest,
    R,
    StatisticsRequest,
    TaskRequest,
)
from selfpruner.workers.worker_process import Message

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAMESPACE = "selfpruner"
# What puts into the cache what others need.
MAKERS = (BeginRequest, StatisticsRequest, MakeRequest, PrepareRequest)
LOOK_SECONDS = 2.0  # between two looks at the cluster's nodes
TOUCH_SECONDS = 20.0  # between two signs that a worker is still wanted
LEASE_SECONDS = 180.0  # after which a worker that nobody asks for ends
START_SECONDS = 60.0  # a worker may take to start, once its node is there
ALONE_SECONDS = 60.0  # tasks wait for a node to join when the last one has left
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs and what it takes of the node."""

    node: str
    host: str
    device: str
    index: int
    cpus: float
    gpus: int


@dataclass(frozen=True, slots=True)
class Made:
    """Since when, and until when, a worker put what it made for a session into its node's cache."""

    slot: Slot
    began: float
    ended: float


class RayConnection:
    """A :class:`~selfpruner.workers.worker_process.Connection` by way of an actor."""

    def __init__(self, relay: ActorHandle[Relay], place: Place, pid: int) -> None:
        self.relay = relay
        self.inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self.alive = True
        self.pid = pid
        self._place = place
        self._cause = "was stopped."
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._touch())]

    async def send(self, message: Mapping[str, object]) -> None:
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            await self.relay.send.remote(message)

    async def end(self) -> None:
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(_reply(self.relay.end.remote()), 5)
        ray.kill(self.relay)
        self.alive = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cause(self) -> str:
        return self._cause

    async def _read(self) -> None:
        from ray.exceptions import RayError

        try:
            async for reference in self.relay.receive.remote():
                message: Message = await reference
                if message["op"] == "dead":
                    self._cause = f"of node {self._place.host} {message['text']}"
                    return
                self.inbox.put_nowait(message)
        except RayError:
            self._cause = (
                f"was lost: its node {self._place.host} left the cluster, or its actor was killed. `ray status` shows both."
            )
        finally:
            self.alive = False
            self.inbox.put_nowait(None)

    async def _touch(self) -> None:
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            while True:
                await asyncio.sleep(TOUCH_SECONDS)
                await self.relay.touch.remote()


class RayPool(ProcessPool):
    """A :class:`~selfpruner.workers.base.WorkerPool` on the cluster at ``address`` (``HOST:PORT`` of its head).

    Args:
        devices: which workers a node gets. ``cuda``: one per GPU; ``cpu``: one with all its cores, twice: two that share them;
            ``auto``: ``cuda`` where any node has a GPU, else ``cpu``.
        memory: bytes of the node's memory that each worker reserves, so that Ray places nothing else there.
        name: with a name, workers outlive this process for :data:`LEASE_SECONDS`, and a pool of the same name finds them again.

    The other arguments are those of ProcessPool. Raises ConfigError where there is no such cluster or it has no such device.
    """

    def __init__(
        self,
        address: str,
        *,
        devices: Sequence[str] = ("auto",),
        memory: int | None = None,
        name: str | None = None,
        handler: str = "selfpruner.jobs.handler:SessionHandler",
        max_attempts: int = 3,
        task_timeout: float | None = None,
        heartbeat_timeout: float = 60.0,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        self._address = address
        self._device, self._per_node = _of_nodes(devices)
        self._memory = memory
        self._name = name
        self._places: dict[str, Place] = {}
        self._makers: dict[str, dict[str, Made]] = {}  # by session and device, what may be in the node's cache alone
        self._shared: dict[tuple[str, str, str], float] = {}  # when a device got what another one has for a session
        self._watching: asyncio.Task[None] | None = None
        _connect(address)
        if self._device == "auto":
            self._device = "cuda" if any(node["Resources"].get("GPU") for node in _nodes()) else "cpu"
        found = self._found()
        if not found:
            _disconnect()
            raise ConfigError(
                f"The Ray cluster at {address} has no GPU. Add a node with one (`ray start --num-gpus=...`), or use device cpu.",
                param="devices",
            )
        super().__init__(
            list(found),
            handler=handler,
            max_attempts=max_attempts,
            task_timeout=task_timeout,
            heartbeat_timeout=heartbeat_timeout,
            environment=environment,
        )
        self._places = found

    @property
    def workers(self) -> int:
        return max(1, sum(not slot.gone for slot in self._slots))

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        """See :meth:`selfpruner.workers.base.WorkerPool.run`. A checkpoint is in this machine's folder afterwards."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        result = await super().run(session, request, on_progress)
        if isinstance(request, ExportRequest):
            await self._fetch(session, Path(request.directory))
        return result

    async def close(self) -> None:
        """See ProcessPool. Ends the workers and leaves the cluster."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await super().close()
        _disconnect()

    # -- workers ---------------------------------------------------------------------------------------------------------
    async def _launch(self, slot: Slot) -> RayConnection:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = self._places[slot.device]
        named = {} if self._name is None else {"name": f"{self._name}-{slot.device}", "lifetime": "detached", "get_if_exists": True}
        relay = (
            ray.remote(Relay)
            .options(
                num_cpus=place.cpus,
                num_gpus=place.gpus,
                memory=self._memory,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
                **named,
            )
            .remote(self._handler, place.device, self._heartbeat_timeout, dict(self._environment), LEASE_SECONDS)
        )
        try:
            told = await asyncio.wait_for(_reply(relay.adopt.remote()), START_SECONDS)
        except TimeoutError:
            ray.kill(relay)
            raise WorkerError(
                f"No worker could be started on node {place.host} within {START_SECONDS:g} s: its {_taken(place)} are taken. "
                "`ray status` shows by whom."
            ) from None
        except RayError as error:
            if place.node not in {node["NodeID"] for node in _nodes()}:
                raise DeviceGoneError from error
            if "No module named 'selfpruner'" in str(error):
                raise WorkerError(
                    f"Node {place.host} has no selfpruner. Every node needs the same versions: pip install 'selfpruner[ray]'."
                ) from error
            raise WorkerError(f"No worker could be started on node {place.host}: {_first_line(error)}") from error
        own = version("selfpruner")
        if told["version"] != own:
            ray.kill(relay)
            raise WorkerError(
                f"Node {place.host} has selfpruner {told['version']}, and this machine {own}. Every node needs the same version."
            )
        return RayConnection(relay, place, told["pid"])

    async def _attempts(self, slot: Slot, session: Session, request: TaskRequest[R], on_progress: OnProgress | None) -> object:
        await self._share(slot, session)
        began = time.monotonic()
        try:
            answer = await super()._attempts(slot, session, request, on_progress)
        except ModelNotFoundError as error:
            host = self._places[slot.device].host
            raise ModelNotFoundError(
                f"On node {host}: {error.message} Every node needs the model's files, under the same path.", param=error.param
            ) from error
        if isinstance(request, MAKERS):
            made = self._makers.setdefault(session.key, {})
            first = made[slot.device].began if slot.device in made else began
            made[slot.device] = Made(slot, first, time.monotonic())
        return answer

    # -- nodes -----------------------------------------------------------------------------------------------------------
    def _found(self) -> dict[str, Place]:
        """The workers that the cluster's nodes have room for, by name."""
        places = {}
        for node in _nodes():
            resources, host = node["Resources"], node["NodeManagerHostname"]
            gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
            count = gpus if self._device == "cuda" else self._per_node if cpus else 0
            for index in range(count):
                place = (
                    Place(node["NodeID"], host, "cuda:0", index, 0, 1)  # a worker sees its own GPU only
                    if self._device == "cuda"
                    else Place(node["NodeID"], host, "cpu", index, max(cpus / count // 1, 1 / count), 0)
                )
                places[f"{host}-{node['NodeID'][:8]}-{place.device.split(':')[0]}-{index}"] = place
        return places

    async def _watch(self) -> None:
        """Add the workers of nodes that joined, and fail waiting tasks when no node is left."""
        alone = 0.0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            found = await asyncio.to_thread(self._found)
            for name, place in found.items():
                if name not in self._places:
                    self._places[name] = place
                    self._add(name)
            alone = alone + LOOK_SECONDS if all(slot.gone for slot in self._slots) else 0.0
            if alone > ALONE_SECONDS:
                self._fail_waiting(
                    WorkerError(f"No worker is left in the Ray cluster at {self._address}. `ray status` shows its nodes.")
                )

    # -- files -----------------------------------------------------------------------------------------------------------
    async def _share(self, slot: Slot, session: Session) -> None:
        """Give the slot's node what others have in their caches for the session, as far as it does not see it there."""
        from ray.exceptions import RayError

        for device, made in self._makers.get(session.key, {}).items():
            between = (session.key, slot.device, device)
            link = made.slot.link
            if made.slot is slot or made.ended <= self._shared.get(between, 0.0) or not isinstance(link, RayConnection):
                continue
            here = await self._started(slot)
            assert isinstance(here, RayConnection)
            now = time.monotonic()
            # A node that is lost meanwhile costs only what this one then computes itself.
            with contextlib.suppress(RayError):
                entries = await link.relay.used_entries.remote(session.cache, now - made.began + 1)
                wanted = await link.relay.listing.remote(session.cache, entries)
                has = await here.relay.listing.remote(session.cache, entries)
                for name in wanted.keys() - has.keys():
                    await here.relay.write.remote(session.cache, name, link.relay.read.remote(session.cache, name))
            self._shared[between] = now

    async def _fetch(self, session: Session, directory: Path) -> None:
        """The checkpoint that a worker wrote to ``directory`` of its node, here."""
        from ray.exceptions import RayError

        if (directory / "config.json").exists():
            return
        for slot in self._slots:
            if slot.session != session.key or not isinstance(slot.link, RayConnection) or not slot.link.alive:
                continue
            with contextlib.suppress(RayError):
                relay = slot.link.relay
                for name in sorted(await relay.listing.remote(str(directory), ["."]), key=lambda name: name == "config.json"):
                    write_file(directory, name, await relay.read.remote(str(directory), name))
                if (directory / "config.json").exists():
                    return
        raise WorkerError(f"The checkpoint was written to {directory} of a node that is lost. Resume the job to write it again.")


async def _reply(reference: Any) -> Any:
    return await reference


def _of_nodes(devices: Sequence[str]) -> tuple[str, int]:
    """("cpu", 2) for two workers of every node, who share its cores. Raises ConfigError for what nodes differ in."""
    device, count = devices[0].removesuffix(":0"), len(devices)
    if len(set(devices)) > 1 or device not in ("auto", "cuda", "cpu") or (count > 1 and device != "cpu"):
        raise ConfigError(
            "On a Ray cluster devices are those of every node: auto, cuda (all its GPUs), cpu or cpu*N.", param="devices"
        )
    return device, count


def _connect(address: str) -> None:
    """Join the cluster at ``address``, and none but that. Raises ConfigError."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("Ray is not installed: pip install 'selfpruner[ray]'.", param="ray") from error
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536 or "/" in host:
        raise ConfigError(f"The address of a Ray cluster is HOST:PORT, such as 10.0.0.1:6379, not {address!r}.", param="ray")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at {address} ({error}). Start one: ray start --head --port={port}.", param="ray"
        ) from error
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (RuntimeError, ConnectionError, ValueError) as error:
        why = _first_line(error)
        if "ersion mismatch" in str(error):
            raise ConfigError(f"The Ray cluster at {address} runs other versions: {why}", param="ray") from error
        raise ConfigError(
            f"The Ray cluster at {address} cannot be used from here: {why} If this machine is no node of it, run "
            f"`ray start --address={address}`.",
            param="ray",
        ) from error


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _taken(place: Place) -> str:
    return "GPUs" if place.gpus else "cores"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
