"""Gateway and engine as Ray Serve deployments."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from graft.artifacts import Store
from graft.core.errors import ServingError
from graft.core.model import StrictModel
from graft.models.ready import ReadyModel
from graft.models.section import ModelSection
from graft.recipe.operation import ServeSection
from graft.serving.catalog import Catalog
from graft.serving.drift_feed import DriftFeed, Observe
from graft.serving.gateway import Gateway, Served
from graft.serving.messages import Item, Job, Started
from graft.serving.tenants import Tenant

if TYPE_CHECKING:
    import numpy as np
    from fastapi import FastAPI
    from ray.serve import Application

logger = logging.getLogger(__name__)

MONITOR_LOOKUP_S = 5.0
START_ATTEMPTS = 3
GATEWAY, ENGINE = "gateway", "engine"


class ServePlan(StrictModel):
    """Everything that the deployments need; holds hashes of keys, never keys."""

    name: str
    home: Path
    model: ModelSection
    ready: ReadyModel
    settings: ServeSection
    names: dict[str, str]
    """Served name → reference in the store."""
    monitors: dict[str, str] = Field(default_factory=dict)
    """Served name → name of the actor that watches it, where one may."""
    monitor_namespace: str = "graft"


class EngineReplica:
    """One copy of the base with its engine. Knows adapters by digest only."""

    def __init__(self, plan: ServePlan) -> None:
        import torch

        from graft.data.template import ChatTemplate
        from graft.engine.embed import embed_texts
        from graft.engine.multi import MultiAdapterModel
        from graft.models import load_model, load_tokenizer
        from graft.serving.engines.native import NativeEngine

        torch.set_num_threads(max((os.cpu_count() or 1) // plan.settings.replicas, 1))
        model = MultiAdapterModel(load_model(plan.ready, plan.model))
        tokenizer = load_tokenizer(plan.ready)
        self._plan = plan
        self._engine = NativeEngine(
            model,
            ChatTemplate(tokenizer),
            Store(plan.home),
            ready=plan.ready,
            section=plan.model,
            max_batch=plan.settings.max_batch,
            max_length=plan.settings.max_length,
        )
        # A tokenizer of its own, since the feed embeds in a thread of its own.
        embed = partial(embed_texts, model, copy.deepcopy(tokenizer))
        self._feed = DriftFeed(embed, self._find_monitor)
        self._monitors: dict[str, tuple[float, Any]] = {}

    async def answer(self, job: Job) -> AsyncGenerator[Item, None]:
        """Answers one job; Serve closes the generator when the gateway cancels."""
        async for item in self._engine.answer(job):
            if isinstance(item, Started):
                self._feed.push(job)
            yield item

    def check_health(self) -> None:
        """Called by Serve now and then; raising replaces the replica."""
        if not self._engine.is_alive:
            raise ServingError("the engine's thread has died")

    def _find_monitor(self, name: str) -> Observe | None:
        import ray

        actor_name = self._plan.monitors.get(name)
        if actor_name is None:
            return None
        looked_up_s, actor = self._monitors.get(name, (-MONITOR_LOOKUP_S, None))
        if time.monotonic() - looked_up_s >= MONITOR_LOOKUP_S:
            try:
                actor = ray.get_actor(actor_name, namespace=self._plan.monitor_namespace)
            except ValueError:
                actor = None
            self._monitors[name] = (time.monotonic(), actor)
        if actor is None:
            return None

        def observe(vectors: np.ndarray) -> None:
            actor.observe.remote(name, vectors)

        return observe


class RemoteEngine:
    """The engine replicas as the gateway sees them."""

    def __init__(self, handle: Any) -> None:
        self._answer = handle.options(stream=True).answer

    async def answer(self, job: Job) -> AsyncGenerator[Item, None]:
        """Answers one job on some replica; if it dies before anything was told, on another.

        Raises:
            ServingError: The replica died while it answered.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            items = self._answer.remote(job)
            held: list[Item] = []
            is_told = False
            try:
                async for item in items:
                    held.append(item)
                    if isinstance(item, Started) and not job.is_streamed:
                        continue
                    is_told = True
                    while held:
                        yield held.pop(0)
                return
            except Exception as error:  # Ray names a lost replica in many ways
                logger.warning("attempt %d at %s failed: %s", attempt, job.request_id, error)
                if is_told or attempt == START_ATTEMPTS:
                    raise ServingError(f"the engine broke: {type(error).__name__}") from error
            finally:
                items.cancel()


class GatewayReplica:
    """The ingress: HTTP in, jobs out."""

    def __init__(self, plan: ServePlan, tenants: tuple[Tenant, ...], engine: Any) -> None:
        settings = plan.settings
        self._gateway = Gateway(
            engine=RemoteEngine(engine),
            catalog=Catalog(Store(plan.home), plan.names, plan.model.source, plan.ready.digest),
            tenants=tenants,
            max_requests=settings.replicas * settings.max_batch + settings.max_queue,
            on_served=_make_meter(),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        return self._gateway.app(names_requests=False)  # Serve's proxy does


def build_application(
    plan: ServePlan, tenants: tuple[Tenant, ...], *, uses_gpu: bool
) -> Application:
    """Binds both deployments.

    Args:
        plan: What is served.
        tenants: Who may call.
        uses_gpu: Each engine takes a GPU.
    """
    from ray import serve

    settings = plan.settings
    engine = serve.deployment(EngineReplica).options(
        name=ENGINE,
        num_replicas=settings.replicas,
        ray_actor_options=_resources(uses_gpu=uses_gpu),
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
    )
    gateway = serve.deployment(serve.ingress(None)(GatewayReplica)).options(
        name=GATEWAY,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        # The gateway itself answers 429, so that the answer is OpenAI's.
        max_ongoing_requests=16 * (settings.replicas * settings.max_batch + settings.max_queue),
        graceful_shutdown_timeout_s=20,
    )
    return gateway.bind(plan, tenants, engine.bind(plan))


def _resources(*, uses_gpu: bool) -> dict[str, float]:
    if uses_gpu:
        return {"num_cpus": 1, "num_gpus": 1}
    # A fraction: the engine computes only while somebody asks, and a re-search must still fit.
    return {"num_cpus": 0.1}


def _make_meter() -> Callable[[Served], None]:
    """Ray's metrics of finished requests; no label holds what a caller wrote."""
    from ray.util.metrics import Counter, Histogram

    keys = ("tenant", "adapter", "version")
    seconds = [0.01 * 2**power for power in range(14)]
    requests = Counter(
        "graft_request_total", "Chat requests, finished.", tag_keys=(*keys, "route", "code")
    )
    tokens = Counter("graft_tokens_total", "Tokens read and written.", tag_keys=(*keys, "type"))
    ttft = Histogram("graft_ttft_seconds", "Time to the first text.", seconds, tag_keys=keys)
    e2e = Histogram("graft_e2e_seconds", "Time to the end of the answer.", seconds, tag_keys=keys)

    def record(served: Served) -> None:
        tags = {"tenant": served.tenant, "adapter": served.adapter, "version": served.version}
        requests.inc(tags={**tags, "route": "chat", "code": str(served.code)})
        if served.num_prompt_tokens:
            tokens.inc(served.num_prompt_tokens, tags={**tags, "type": "input"})
        if served.num_new_tokens:
            tokens.inc(served.num_new_tokens, tags={**tags, "type": "output"})
        if served.ttft_s is not None:
            ttft.observe(served.ttft_s, tags=tags)
        e2e.observe(served.e2e_s, tags=tags)

    return record
