"""``melt-run serve``: start a server that runs until a signal ends it."""

from __future__ import annotations

import math
import os
import socket
import ssl
import stat
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..decoding.prefix_cache import PrefixCache
from ..decoding.settings import PIPELINE
from ..errors import ArgumentError
from ..machine import available_memory
from ..package.specs import MAX_LOOPS
from ..runtime import Runtime
from ..scheduler.scheduler import Scheduler
from ..server.limits import MAX_SECONDS, MAX_UNREAD, STALLED
from ..server.logs import FORMATS, LEVELS, configure, log
from ..untrusted import shown
from .config import section_read
from .options import LoadOptions, PackageDirectory, PipelineMode, grouped, short_name
from .variables import KEYS_VARIABLE

_YEAR = 365 * 86_400  # seconds
_MOST_STALL = (2**31 - 1) // 1000  # seconds: the system counts milliseconds in 32 bits
LogLevel = StrEnum("LogLevel", {name: name for name in LEVELS})  # type: ignore[misc]
LogFormat = StrEnum("LogFormat", {name: name for name in FORMATS})  # type: ignore[misc]
PREFIX_BYTES = 64 << 20  # default size of the prefix cache


@grouped
def serve_command(
    *,
    package: PackageDirectory,
    config: Annotated[
        Path | None,
        typer.Option(callback=section_read, is_eager=True, help="As melt-run --config: a TOML file with [serve]."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name to clients; default: as called here.")] = None,
    slots: Annotated[
        int | None, typer.Option(help="Requests that run at once; default: the package's most.", min=1)
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for a slot.", min=0)] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most new tokens a choice may have; default: as many as the cache holds.", min=1)
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(help="Most seconds a request may take, waiting included.")
    ] = MAX_SECONDS,
    max_loops: Annotated[
        int | None,
        typer.Option(help="Most loops per token; default: four times the package's.", min=1, max=MAX_LOOPS),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(help="Connections at once; default: 512, or as many as the system allows.", min=1),
    ] = None,
    watchdog: Annotated[
        float, typer.Option(help="Seconds without a step after which /ready says that the server is stuck.", min=0.1)
    ] = STALLED,
    max_unread: Annotated[
        int,
        typer.Option(
            help="Tokens that all clients together may leave unread; above, the furthest behind is cut.", min=1
        ),
    ] = MAX_UNREAD,
    stall: Annotated[
        int,
        typer.Option(
            help="Seconds after which a client that takes nothing of its reply is cut.", min=1, max=_MOST_STALL
        ),
    ] = 120,
    prefix_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes of memory that keep the beginnings of prompts, which then need not run again; 0: none; "
            "default: 64 MiB, where they are to be had.",
            min=0,
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request's body.", min=1)] = 1 << 20,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file of API keys, one per line, besides those in {KEYS_VARIABLE}.")
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen on an address that others reach, with no key at all.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="An origin, such as https://chat.example.org, whose web pages may call the server; may be repeated."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate chain (PEM), for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    drain: Annotated[
        int, typer.Option(help="Seconds that SIGTERM leaves to what is running before it is cut.", min=0, max=_YEAR)
    ] = 30,
    pipeline: PipelineMode = "auto",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged; debug has health checks, too.")] = (
        LogLevel.info  # type: ignore[attr-defined]
    ),
    log_format: Annotated[LogFormat, typer.Option(help="A line of the log: json, or text for people.")] = (
        LogFormat.json  # type: ignore[attr-defined]
    ),
    loading: LoadOptions,
) -> None:
    """Serve a package over HTTP: OpenAI's completions and chats, metrics, and a page to try it."""
    try:
        import uvicorn

        from ..server.app import Limits, build_app
        from ..server.connection import HEADER_BYTES, bounded, room
        from ..server.guard import Keys, is_loopback
        from ..server.lifecycle import DrainingServer
        from ..server.origins import check_origins
        from ..server.process import configure_process
        from ..server.service import Service
    except ImportError as error:
        raise ArgumentError(f"serving needs more ({error}): pip install 'melt-export[serve]'") from error
    keys = Keys.read(os.environ.get(KEYS_VARIABLE), api_key_file)
    if keys and without_key:
        given = [] if KEYS_VARIABLE not in os.environ else [KEYS_VARIABLE]
        given += [] if api_key_file is None else [f"--api-key-file {api_key_file}"]
        raise ArgumentError(
            f"--without-key admits everyone, and {' and '.join(given)} gives keys; leave out one of them"
        )
    if not (keys or without_key or is_loopback(host)):
        raise ArgumentError(
            f"{host} can be reached by others and there is no API key; set {KEYS_VARIABLE}, or say --without-key"
        )
    if (tls_cert is None) != (tls_key is None):
        raise ArgumentError("--tls-cert and --tls-key belong together")
    if tls_cert is not None and tls_key is not None:
        _require_tls(tls_cert, tls_key)
    if not 0 < max_seconds < math.inf:
        raise ArgumentError(f"--max-seconds is {max_seconds:g}; it must be a finite number of seconds above 0")
    if pipeline not in PIPELINE:
        raise ArgumentError(f"--pipeline is {shown(pipeline)}; it must be one of {', '.join(PIPELINE)}")
    origins = check_origins(cors_origin or ())
    allowed = room(max_connections)
    listener = _listen(host, port, stall)
    configure_process()
    runtime = loading.load(package)
    prefixes = _prefix_store(runtime, slots, prefix_bytes)
    scheduler = Scheduler(runtime, slots, max_waiting, prefixes)
    name = name or short_name(package)
    service = Service(runtime, scheduler, name, max_tokens, max_seconds, max_unread, max_loops, watchdog, pipeline)
    app = build_app(service, Limits(max_body, keys, is_loopback(host) and not keys, log_prompts, origins))
    configure(str(log_level), str(log_format))
    settings = uvicorn.Config(
        app,
        http=bounded(allowed.connections),
        backlog=allowed.backlog,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        timeout_graceful_shutdown=1,  # DrainingServer has already waited
    )
    settings.load()
    server = DrainingServer(settings, scheduler, drain)
    server.take_signals()
    scheme = "http" if tls_cert is None else "https"
    where = f"[{host}]" if ":" in host else host
    log(
        "listening",
        url=f"{scheme}://{where}:{listener.getsockname()[1]}",
        model=service.name,
        slots=scheduler.slots,
        connections=allowed.connections,
        state_bytes=scheduler.metrics().state_bytes,
        prefix_bytes=0 if prefixes is None else prefixes.max_bytes,
        backend=runtime.backend.name,
    )
    try:
        server.run(sockets=[listener])
    finally:
        scheduler.close(drain=False)
    log("stopped")
    sys.stdout.flush()
    os._exit(0)  # normal interpreter exit would wait for threads and unload libraries


def _require_tls(cert: Path, key: Path) -> None:
    """Raise ArgumentError for an unusable certificate and key, before anything large is loaded."""
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            mode = path.stat().st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):  # reading may never end, and it is read twice
                raise ArgumentError(f"{option} {path} is a pipe or a device; it must be a file")
            path.open("rb").close()
        except OSError as error:
            raise ArgumentError(f"{option} {path} cannot be read: {error.strerror}") from error
    try:
        # Else a password would be asked for at the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"--tls-cert {cert} and --tls-key {key} are no certificate chain and its key (PEM, without a password): "
            f"{error}"
        ) from error


def _prefix_store(runtime: Runtime, slots: int | None, asked: int | None) -> PrefixCache | None:
    """Make the prefix cache. Raises ArgumentError for more memory than is available."""
    free = available_memory()
    if free is not None and runtime.backend.name == "onnxruntime":  # which also holds the slots' state
        batch = runtime.backend.max_batch if slots is None else slots
        free = max(free - runtime.memory(batch=batch).session_bytes, 0)
    if asked is None:
        asked = PREFIX_BYTES if free is None else min(PREFIX_BYTES, free // 4)
    elif free is not None and asked > free:
        raise ArgumentError(f"--prefix-bytes is {asked:,}; {free:,} bytes of memory are available besides the state")
    return PrefixCache(asked) if asked else None


def _listen(host: str, port: int, stall: int) -> socket.socket:
    """Open the listening socket before anything large is loaded. Raises ArgumentError.

    Where the system supports it, connections end when the client takes nothing for ``stall`` seconds.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)  # type: ignore[arg-type]
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall * 1000)
        return listener
    except OSError as error:
        raise ArgumentError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
