"""A Ray session for one piece of work: the named cluster, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from graft.core.errors import ConfigError
from graft.core.process import prepare_process

ADDRESS_VARIABLE = "RAY_ADDRESS"

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns about its own future default
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # by default 3 x 5 s, which a busy machine needs
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default polls reports every 2 s
    "RAY_worker_niceness": "0",  # at Ray's 15, a lane that holds Python's lock waits for the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # events.jsonl is our own record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the command, not one of its searches
    "TUNE_FORCE_TRIAL_CLEANUP_S": "120",  # a step and a checkpoint, or a run that hangs
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # the study is the truth; Tune's snapshots are not read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass(frozen=True)
class RaySession:
    """What the session runs on."""

    address: str
    """Of the cluster's head."""
    is_local: bool
    """Started by, and ending with, this process."""
    node_cpus: int
    """CPU cores of the largest node."""
    num_gpus: int
    """GPUs of the whole cluster."""

    def now(self) -> RaySession:
        """Returns the same session with the nodes that its cluster has by now."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return replace(
            self,
            node_cpus=int(max((node.get("CPU", 0.0) for node in nodes), default=0.0)),
            num_gpus=int(sum(node.get("GPU", 0.0) for node in nodes)),
        )


def names_cluster(address: str | None = None) -> bool:
    """Tells whether a session joins a cluster that is there already."""
    import ray

    named = address or os.environ.get(ADDRESS_VARIABLE) or "local"
    return ray.is_initialized() or named != "local"


@contextmanager
def ray_session(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    dashboard: bool = False,
    namespace: str = "graft",
) -> Iterator[RaySession]:
    """Joins a cluster or starts a local one; leaves it, and stops only what it started.

    A session inside a session is the same session.

    Args:
        address: The head's `host:port`; None means `RAY_ADDRESS`, then a local cluster of its own.
        num_cpus: Logical CPUs of a local cluster; None means the machine's.
        dashboard: Whether a local cluster has a dashboard.
        namespace: Where named actors live.

    Raises:
        ConfigError: The address cannot be reached or is of Ray's client protocol.
    """
    prepare_process()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield _describe(is_local=False)
        return
    named = address or os.environ.get(ADDRESS_VARIABLE)
    if named is not None and named.startswith("ray://"):
        raise ConfigError(
            f"{named} is an address of Ray's client protocol, under which a search would not "
            "outlive a lost connection; give the head's host:port (6379 by default), or use "
            "`ray job submit`"
        )
    is_local = named is None or named == "local"
    try:
        ray.init(
            address="local" if is_local else named,
            num_cpus=num_cpus if is_local else None,
            include_dashboard=dashboard if is_local else None,
            namespace=namespace,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"cannot reach a Ray cluster at {named!r}: {error}; check the address and, where the "
            "cluster asks for a token, RAY_AUTH_MODE=token in this environment too"
        ) from error
    _protect_token()
    try:
        yield _describe(is_local=is_local)
    finally:
        ray.shutdown()


def _describe(*, is_local: bool) -> RaySession:
    import ray

    address = str(ray.get_runtime_context().gcs_address)
    return RaySession(address, is_local=is_local, node_cpus=0, num_gpus=0).now()


def _protect_token() -> None:
    """Takes a generated token file away from other users: Ray 2.60 leaves it world-readable."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    try:
        if token.is_file() and token.stat().st_uid == os.getuid():
            token.chmod(0o600)
    except OSError:
        return
