"""`serve`: adapters of one base behind the OpenAI-compatible endpoint."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.artifacts import Store
from graft.artifacts.names import parse_reference
from graft.core.errors import AdapterError, ConfigError, ServingError
from graft.core.files import require_writable, write_json
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.methods.base import METHODS
from graft.models import ReadyModel, resolve_model
from graft.serving.catalog import BASE, SHORT_DIGEST
from graft.serving.deployments import ServePlan, build_application
from graft.serving.tenants import Tenant, read_tenants

if TYPE_CHECKING:
    from ray.serve import Application

    from graft.recipe.operation import ServeSection
    from graft.recipe.sections import Recipe
    from graft.recipe.space import Sections

    ServableRecipe = Recipe | Sections

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 120.0
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


class ServeReport(StrictModel):
    """What is served, and where."""

    name: str
    url: str
    """Base URL for OpenAI clients, `http://127.0.0.1:8000/v1`."""
    base: str
    """Id of the base model."""
    names: dict[str, str]
    """Served name → version at the start, `name@<short digest>`."""
    tenants: dict[str, tuple[str, ...]]
    """Tenant → the names that it may call."""
    pid: int
    """Of the process that started it."""


def serving_recipe(
    target: str, overrides: Sequence[str], *, home: Path
) -> tuple[ServableRecipe, dict[str, str]]:
    """Finds what `graft serve RECIPE|ADAPTER` means.

    Args:
        target: A recipe file, with or without holes, or a reference to an adapter that carries its
            recipe.
        overrides: `serve.port=0` and the like.
        home: Where adapters are.

    Returns:
        The recipe, and served name → reference: the adapter under its name, or the recipe's name.

    Raises:
        ConfigError: The recipe is wrong.
        AdapterError: There is no such adapter.
    """
    from graft.pipelines.forms import recipe_for
    from graft.recipe import load_recipe

    store = Store(home)
    if Path(target).suffix in (".yaml", ".yml") or Path(target).is_file():
        sections = load_recipe(target, overrides).sections()
        is_known = sections.name in store.names.names()
        return sections, {sections.name: sections.name} if is_known else {}
    stored = store.resolve(target)
    recipe = recipe_for(target, None, overrides, home=home)
    return recipe, {parse_reference(target).name or stored.record.name: target}


def plan_serving(
    recipe: ServableRecipe,
    *,
    home: Path,
    names: Mapping[str, str] | None = None,
    progress: Progress = QUIET,
) -> tuple[ServePlan, tuple[Tenant, ...]]:
    """Checks everything that can be checked before anything starts.

    Args:
        recipe: Its `model` and `serve` sections count.
        home: Where adapters and models are.
        names: Served name → reference in the store; the names of `serve.tenants` stand for
            themselves.
        progress: Told of the base being made ready.

    Raises:
        ConfigError: No tenant, a key that is not set, an unsafe host.
        AdapterError: A name without a usable adapter, or an adapter of another base.
    """
    from graft.runtime.monitor import NAMESPACE, monitor_name

    tenants = read_tenants(recipe.serve.tenants, os.environ)
    served = {name: name for tenant in tenants for name in sorted(tenant.models) if name != BASE}
    served |= dict(names or {})
    ready = resolve_model(recipe.model, home, progress=progress)
    store = Store(home)
    for name, reference in served.items():
        _require_servable(store, name, reference, ready, recipe)
    plan = ServePlan(
        name=recipe.name,
        home=home,
        model=recipe.model,
        ready=ready,
        settings=recipe.serve,
        names=served,
        monitors={name: monitor_name(name) for name in served},
        monitor_namespace=NAMESPACE,
    )
    return plan, tenants


def serve(
    recipe: ServableRecipe,
    *,
    home: Path,
    names: Mapping[str, str] | None = None,
    block: bool = True,
    on_ready: Callable[[ServeReport], None] = lambda report: None,
    progress: Progress = QUIET,
) -> ServeReport:
    """Starts serving and waits until requests are answered.

    Args:
        recipe: Its `model` and `serve` sections count.
        home: Where adapters and models are; `serve/<name>.json` there says what runs.
        names: Served name → reference in the store; see `plan_serving`.
        block: Serve until interrupted, in a Ray session of its own where there is none. Otherwise
            return at once; the caller's session must be open, and `stop_serving` ends it.
        on_ready: Told once when requests are answered.
        progress: Told of every stage.

    Raises:
        ConfigError: Wrong settings, or no Ray session where one is needed.
        AdapterError: A name without a usable adapter.
        ServingError: Ray Serve could not start it.
    """
    from graft.runtime.session import ray_session

    require_writable(home / "serve", "what is served", keep=False)
    plan, tenants = plan_serving(recipe, home=home, names=names, progress=progress)
    if not block:
        report = _start(plan, tenants, progress)
        on_ready(report)
        return report
    with ray_session():
        report = _start(plan, tenants, progress)
        try:
            on_ready(report)
            _wait_for_interrupt()
        finally:
            stop_serving(plan.name, home=home)
    return report


def stop_serving(name: str, *, home: Path) -> None:
    """Ends what `serve` started under a recipe's name; running requests are finished first."""
    from ray import serve as ray_serve

    ray_serve.delete(name)
    if not ray_serve.status().applications:
        ray_serve.shutdown()
    (home / "serve" / f"{name}.json").unlink(missing_ok=True)


def _start(plan: ServePlan, tenants: tuple[Tenant, ...], progress: Progress) -> ServeReport:
    import ray
    from ray import serve as ray_serve

    if not ray.is_initialized():
        raise ConfigError("serving needs a Ray session; call it inside `with ray_session():`")
    _require_safe_host(plan.settings)
    port = _free_port(plan.settings)
    with progress.task("start serving", 2, "stage") as task, _quiet_serve():
        _start_proxy(plan.settings.host, port)
        task.advance()
        url = _url(plan.settings.host, port)
        is_served = plan.name in ray_serve.status().applications
        try:
            _run(plan, tenants)
            _wait_until_healthy(url)
        except BaseException:  # an interrupt, too: what was started would stay on the cluster
            if not is_served:  # else by another process, which goes on
                stop_serving(plan.name, home=plan.home)
            raise
        task.advance()
    store = Store(plan.home)
    report = ServeReport(
        name=plan.name,
        url=f"{url}/v1",
        base=plan.model.source,
        names={
            name: f"{name}@{store.resolve_digest(reference)[:SHORT_DIGEST]}"
            for name, reference in plan.names.items()
        },
        tenants={tenant.name: tuple(sorted(tenant.models)) for tenant in tenants},
        pid=os.getpid(),
    )
    write_json(plan.home / "serve" / f"{plan.name}.json", report.model_dump(mode="json"))
    return report


def application(plan: ServePlan, tenants: tuple[Tenant, ...]) -> Application:
    """Binds what is served, with a GPU for each engine where the cluster has or may start one."""
    import ray

    from graft.runtime.placement import most_resources

    device = plan.model.device
    has_gpu = ray.is_initialized() and most_resources()["GPU"] > 0
    return build_application(
        plan, tenants, uses_gpu=device == "cuda" or (device == "auto" and has_gpu)
    )


def _run(plan: ServePlan, tenants: tuple[Tenant, ...]) -> None:
    from ray import serve as ray_serve

    try:
        ray_serve.run(application(plan, tenants), name=plan.name, route_prefix="/")
    except Exception as error:  # Serve wraps a failed start in errors of many kinds
        raise ServingError(f"Ray Serve could not start {plan.name!r}: {error}") from error


def _start_proxy(host: str, port: int) -> None:
    """Starts Ray Serve with one HTTP proxy, or joins the Serve that runs already.

    Serve gives a proxy up that a busy machine is slow to start, or that dies, and starts another;
    only its first wait for one does not know that, so a second call joins what is there.

    Raises:
        ServingError: There is no Serve to join either.
    """
    from ray import serve as ray_serve
    from ray.exceptions import RayActorError

    def start() -> None:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})

    try:
        try:
            start()
        except (RayActorError, TimeoutError):
            start()
    except (RayActorError, TimeoutError) as error:
        raise ServingError(f"Ray Serve could not start: {error}") from error


def _require_servable(
    store: Store, name: str, reference: str, ready: ReadyModel, recipe: Recipe | Sections
) -> None:
    from graft.engine.publish import require_answers, require_base

    stored = store.resolve(reference)
    require_answers(stored, f"serve {name}")
    engine = recipe.serve.engine
    servable = METHODS.get(stored.record.method).servable
    if engine not in servable:
        known = ", ".join(sorted(servable)) or "none"
        raise AdapterError(
            f"{name!r} ({str(stored.digest)[:SHORT_DIGEST]}) is of method {stored.record.method}, "
            f"which the engine {engine} does not serve beside others (engines that do: {known}); "
            f"make a model of it, graft export {reference} --format merged --to FOLDER, and serve "
            "that: model.source: FOLDER, with base among the models of a tenant"
        )
    if stored.record.base_digest != ready.digest:
        raise AdapterError(
            f"{name!r} ({str(stored.digest)[:SHORT_DIGEST]}) was made for the base "
            f"{stored.record.base_source} ({str(stored.record.base_digest)[:SHORT_DIGEST]}), and "
            f"model.source is {ready.source} ({ready.digest[:SHORT_DIGEST]}); serve it with its own"
        )
    require_base(stored, ready, recipe.model)  # its chat template and vocabulary, too


def _require_safe_host(settings: ServeSection) -> None:
    """Refuses to answer other machines while Ray's own ports take commands from anybody."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = settings.host == "localhost"
    if not is_loopback and not is_token_auth_enabled():
        raise ConfigError(
            f"serve.host: {settings.host} answers other machines, but this Ray cluster takes "
            "commands without a token, so whoever reaches the machine could run code on it; set "
            "RAY_AUTH_MODE=token where the cluster is started and here, or serve.host: 127.0.0.1"
        )


def _free_port(settings: ServeSection) -> int:
    """The port to listen on; 0 asks the system for a free one.

    Raises:
        ConfigError: Somebody else listens there.
    """
    import ray

    try:
        ray.get_actor(_CONTROLLER, namespace="serve")
    except ValueError:
        pass
    else:
        if settings.port:  # Serve runs already and listens there itself
            return settings.port
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port: cannot listen on {settings.host}:{settings.port} "
                f"({error.strerror}); choose another, or 0 for any free one"
            ) from error
        return int(probe.getsockname()[1])


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _wait_until_healthy(url: str) -> None:
    import httpx

    deadline = time.monotonic() + HEALTH_TIMEOUT_S
    reason = ""
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/health", timeout=5, trust_env=False)
            if response.status_code == httpx.codes.OK:
                return
            reason = f"HTTP {response.status_code}"
        except httpx.HTTPError as error:
            reason = str(error)
        time.sleep(0.1)
    raise ServingError(
        f"nothing answers at {url}/health after {HEALTH_TIMEOUT_S:.0f} s ({reason}); if Ray Serve "
        "already ran on this cluster, it keeps its own port: give that one as serve.port"
    )


@contextmanager
def _quiet_serve() -> Iterator[None]:
    """Keeps Serve's own progress lines, which name no cause, out of the terminal."""
    serve_logger = logging.getLogger("ray.serve")
    level = serve_logger.level
    serve_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        serve_logger.setLevel(level)


def _wait_for_interrupt() -> None:
    """Returns never; Ctrl-C and SIGTERM both raise KeyboardInterrupt."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # SIGINT too: a shell starts background jobs with it ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, interrupt)
    try:
        while True:
            time.sleep(3600)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
