"""A store with two adapters of the tiny base, and a gateway over a real engine, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from graft.artifacts import AdapterRecord, Store
from graft.compressors.base import Adapter
from graft.compressors.folder import save_adapter
from graft.data.template import ChatTemplate
from graft.engine.multi import MultiAdapterModel
from graft.methods.lora import LoraMethod
from graft.models.ready import ReadyModel
from graft.models.section import ModelSection
from graft.recipe.operation import TenantSection
from graft.serving.catalog import Catalog
from graft.serving.engines.native import NativeEngine
from graft.serving.gateway import Gateway, Served
from graft.serving.tenants import read_tenants
from graft.testing import tiny_model, tiny_tokenizer

BASE_DIGEST, TEMPLATE_DIGEST = "b" * 64, "c" * 64
READY = ReadyModel(
    path=Path("tiny"), digest=BASE_DIGEST, template_digest=TEMPLATE_DIGEST, source="tiny"
)
KEYS = {"GRAFT_KEY_ALICE": "sk-alice-0123456789", "GRAFT_KEY_BOB": "sk-bob-01234567890"}
ALICE, BOB = KEYS.values()
TENANTS = (
    TenantSection(name="alice", key_env="GRAFT_KEY_ALICE", models=("lamps", "base")),
    TenantSection(name="bob", key_env="GRAFT_KEY_BOB", models=("doors",)),
)
MAX_LENGTH = 96


def publish(
    store: Store,
    folder: Path,
    *,
    r: int,
    seed: int,
    base: str = BASE_DIGEST,
    template: str | None = None,
) -> str:
    """Publishes an adapter of random weights, large enough to change answers."""
    method = LoraMethod(r=r, lora_alpha=4 * r)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        site: {
            key: torch.randn(value.shape, generator=generator) * 0.1
            for key, value in of_site.items()
        }
        for site, of_site in MultiAdapterModel(tiny_model()).fresh_tensors(method).items()
    }
    path = folder / f"adapter-{r}-{seed}-{base[:2]}"
    save_adapter(path, Adapter(method, tensors), "tiny")
    record = AdapterRecord(
        name="tiny",
        base_source="tiny",
        base_digest=base,
        template_digest=template,
        method="lora",
    )
    return store.publish(path, record)


@dataclass
class Site:
    """A gateway over an engine, and what it was made of."""

    store: Store
    digests: dict[str, str]
    engine: NativeEngine
    gateway: Gateway
    served: list[Served]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.gateway.app(), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://graft")

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on an event loop of its own."""

        async def work() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return self.run(work())

    def chat(self, *, key: str | None = ALICE, **body: Any) -> httpx.Response:
        """One chat request; None as a key sends none."""
        content = {"model": "lamps", "messages": [{"role": "user", "content": "put lamp to 7"}]}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        content = {"max_tokens": 8, **content, **body}
        return self.send("POST", "/v1/chat/completions", json=content, headers=headers)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site of one test's own."""
    with make_site(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def calm_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site for tests that change nothing in it."""
    with make_site(tmp_path_factory.mktemp("site")) as made:
        yield made


@contextmanager
def make_site(tmp_path: Path) -> Iterator[Site]:
    store = Store(tmp_path / "home")
    digests = {
        "lamps": publish(store, tmp_path, r=4, seed=1),
        "doors": publish(store, tmp_path, r=8, seed=2),
        "other": publish(store, tmp_path, r=2, seed=3),
    }
    for name in ("lamps", "doors"):
        store.promote(name, store.register(name, digests[name]))
    served: list[Served] = []
    engine = NativeEngine(
        MultiAdapterModel(tiny_model()),
        ChatTemplate(tiny_tokenizer()),
        store,
        ready=READY,
        section=ModelSection(source=READY.source),
        max_batch=4,
        max_length=MAX_LENGTH,
        max_adapters=2,
    )
    gateway = Gateway(
        engine=engine,
        catalog=Catalog(store, {"lamps": "lamps", "doors": "doors"}, "org/tiny", BASE_DIGEST),
        tenants=read_tenants(TENANTS, KEYS),
        max_requests=8,
        on_served=served.append,
    )
    yield Site(store, digests, engine, gateway, served)
    engine.close()
