"""Ray for one command: the cluster it was told to use, or a small local one, and nothing of it on the terminal."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private import parameter, services
from ray.exceptions import AuthenticationError

from jobs.terminal import Terminal
from pipeline.errors import InputError, RetryableError

OBJECT_STORE_MAX_BYTES = 2**30
"""A local Ray takes no more shared memory than this unless told to."""
_OBJECT_STORE_SHARE = 0.3  # of the machine's memory, Ray's own default share
_KNOCK_SEC = 10.0
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def start_ray(terminal: Terminal, object_store_bytes: int | None = None) -> None:
    """Attach this process to Ray: to the cluster RAY_ADDRESS names (`ray job submit` sets it), else start a local one.

    `object_store_bytes` is the local object store's size, by default 30 % of the memory and 1 GiB at most; a cluster
    has its own. What Ray logs goes where `terminal.capture_logs` sends logging; workers' output is shown only with
    `terminal.verbose`. Does nothing more than that where Ray runs in this process already.
    Raises InputError for an address or token that cannot work, RetryableError where no cluster answers.
    """
    _log_to_root()
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    # What a task of ours raises comes back as what it is, so that the command line can tell what to do about it.
    data_context.raise_original_map_exception = True
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": terminal.verbose}
    context = _attach(address, quiet) if address else _start_local(object_store_bytes, quiet)
    if address and context.dashboard_url:  # a local Ray has none
        terminal.mention_log(f"dashboard: http://{context.dashboard_url}")
    terminal.mention_log(f"Ray's: {Path(context.address_info['session_dir']) / 'logs'}")


def _attach(address: str, quiet: dict[str, Any]) -> Any:
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS is {address}, which only a client outside the cluster can use: run this under "
            "`ray job submit`, or give the address of the cluster as HOST:PORT or auto"
        )
    host, colon, port = address.rpartition(":")
    if colon:
        _knock(host.strip("[]"), port)
    try:
        return ray.init(**quiet)
    except AuthenticationError as error:
        raise InputError(f"the Ray cluster at {address} refuses the token: set RAY_AUTH_MODE and its token") from error
    except ConnectionError as error:
        raise RetryableError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error


def _knock(host: str, port: str) -> None:
    """Raise where nothing listens: Ray itself would try for minutes, and print all the while."""
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SEC).close()
    except ValueError as error:
        raise InputError(f"RAY_ADDRESS is {host}:{port}, which is no HOST:PORT") from error
    except OSError as error:
        raise RetryableError(f"no Ray cluster answers at RAY_ADDRESS={host}:{port}: {error}; is it up?") from error


def _start_local(object_store_bytes: int | None, quiet: dict[str, Any]) -> Any:
    if not any(name in os.environ for name in _AUTH_VARIABLES) and not (Path.home() / ".ray" / "auth_token").exists():
        # Ray would write a token to the home folder, which changes how every later cluster of this user behaves.
        # One that lives in this process's environment guards this Ray as well.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    default_bytes = min(OBJECT_STORE_MAX_BYTES, int(memory_bytes * _OBJECT_STORE_SHARE))
    # "local" because without it Ray attaches to whatever cluster runs on this machine.
    with _bare_node(print_workers=bool(quiet["log_to_driver"])):
        return ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            object_store_memory=object_store_bytes or default_bytes,
            **quiet,
        )


@contextmanager
def _bare_node(*, print_workers: bool) -> Iterator[None]:
    """Within it, Ray starts a node that listens on loopback alone, without the processes that serve nobody on it.

    Ray would put the machine's outward address in place of 127.0.0.1, and listen on all addresses. It would start a
    server of the dashboard that only sends usage statistics, one that adds nodes, and one that prints what workers do:
    2.4 s of a core.
    """
    ours = {
        (services, "resolve_ip_for_localhost"): lambda host: host,
        (services, "start_api_server"): lambda *_, **__: (None, None),
        (parameter, "RayParams"): functools.partial(
            parameter.RayParams, no_monitor=True, include_log_monitor=print_workers
        ),
    }
    with ExitStack() as stack:
        for (module, name), replacement in ours.items():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        yield


def _log_to_root() -> None:
    """Let Ray's loggers speak to the root logger in place of handlers of their own on stderr.

    Handlers that write to files stay. Import of ray and of ray.data sets those on stderr up, so this comes after.
    """
    names = [name for name in logging.root.manager.loggerDict if name == "ray" or name.startswith("ray.")]
    for logger in map(logging.getLogger, names):
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)
        logger.propagate = True
