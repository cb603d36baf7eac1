"""Several replicas of a package behind Ray Serve, each with OpenAI's interface and slots of its own.

    pip install 'melt-export[ray]'
    python examples/ray_serve.py PACKAGE --replicas 2 --port 8000

Ray's proxy sends each request to the replica with fewer requests; a replica that dies or reports itself unhealthy is
replaced. Without RAY_ADDRESS the program starts Ray on this machine and ends it on exit. The header X-Replica of an
answer names its replica. Keys are read from MELT_API_KEYS, which each machine must have, as for ``melt-run serve``.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import typer
from fastapi import FastAPI
from melt_runtime import ArgumentError, Runtime, Scheduler
from melt_runtime.server.app import Limits, build_app
from melt_runtime.server.guard import Keys, is_loopback
from melt_runtime.server.service import Service
from ray import serve

KEYS_VARIABLE = "MELT_API_KEYS"
WAITING = 16  # requests that wait for a slot in a replica; others wait at Ray's proxy


class Named:
    """Wraps an application so that every answer names its replica."""

    def __init__(self, app: Any, name: str):
        self._app, self._header = app, (b"x-replica", name.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, named)


@serve.deployment
@serve.ingress()
class Melt:
    """A replica: a package and all its state, allocated at the start. ``slots`` None: as many as the package allows."""

    def __init__(self, package: str, name: str, slots: int | None, threads: int, local: bool):
        keys = Keys.read(os.environ.get(KEYS_VARIABLE), None)  # read here, so that no key is sent between machines
        if not (keys or local):
            raise ArgumentError(f"there is no API key on this machine; set {KEYS_VARIABLE}")
        runtime = Runtime.load(package, threads=threads)
        self.scheduler = Scheduler(runtime, slots, WAITING)
        self.service = Service(runtime, self.scheduler, name)
        self.limits = Limits(keys=keys, local=local)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application of ``melt-run serve``, which closes the scheduler at its end."""
        app = build_app(self.service, self.limits)
        app.add_middleware(Named, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Raise an error if the replica is unhealthy.

        Ray calls this every few seconds and replaces a replica that raises.
        """
        if not self.scheduler.open:
            raise RuntimeError("the scheduler takes no more requests")


def main(
    package: Annotated[Path, typer.Argument(help="A package, at the same place on every machine.")],
    replicas: Annotated[int, typer.Option(help="How many processes serve it.", min=1)] = 2,
    slots: Annotated[int, typer.Option(help="Requests that one of them runs at once.", min=1)] = 4,
    threads: Annotated[int, typer.Option(help="Threads of each, and processors that Ray reserves for it.", min=1)] = 1,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a package with several replicas until a signal comes."""
    local = is_loopback(host) and KEYS_VARIABLE not in os.environ
    if not (local or KEYS_VARIABLE in os.environ):
        raise SystemExit(f"ray_serve.py: {host} can be reached by others and there is no API key; set {KEYS_VARIABLE}")
    alone = {"num_cpus": replicas * threads, "include_dashboard": False, "object_store_memory": 100 << 20}
    ray.init(**({} if "RAY_ADDRESS" in os.environ else alone))
    serve.start(http_options={"host": host, "port": port})
    deployment = Melt.options(
        num_replicas=replicas,
        max_ongoing_requests=slots + WAITING,
        ray_actor_options={"num_cpus": threads},
    )
    path = package.resolve()
    serve.run(deployment.bind(str(path), path.name, slots, threads, local), route_prefix="/")
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own handlers
        signal.signal(number, lambda *_: over.set())
    print(f"serving at http://{host}:{port}", flush=True)
    over.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
