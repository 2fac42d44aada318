"""Serving starts although its HTTP proxy dies, or is given up as too slow, while it starts."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import httpx
import pytest
import ray
from ray.util import list_named_actors

from graft.pipelines.serve import serve, stop_serving
from graft.recipe.sections import Recipe
from graft.runtime.session import ray_session

PROXY = "SERVE_PROXY_ACTOR-"


def kill_first_proxy(killed: threading.Event) -> None:
    """Kills the first HTTP proxy as soon as it has a name, before it can be ready."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for actor in list_named_actors(all_namespaces=True):
            if actor["name"].startswith(PROXY):
                with contextlib.suppress(ValueError):  # it has a name before it can be found
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
                    killed.set()
                    return
        time.sleep(0.02)


def test_a_proxy_that_dies_while_it_starts_is_replaced(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_KEY_PROXY", "a-key-of-this-test-alone")
    recipe = Recipe.model_validate(
        {
            "name": "proxy",
            "model": {"source": str(model_folder), "dtype": "fp32"},
            "data": {"train": "none.jsonl"},
            "serve": {
                "port": 0,
                "tenants": [{"name": "alice", "key_env": "GRAFT_KEY_PROXY", "models": ["base"]}],
            },
        }
    )
    killed = threading.Event()
    with ray_session(num_cpus=2):
        killer = threading.Thread(target=kill_first_proxy, args=(killed,))
        killer.start()
        try:
            report = serve(recipe, home=tmp_path / "home", names={}, block=False)
            killer.join()
            assert killed.is_set()
            health = httpx.get(report.url.removesuffix("/v1") + "/health", trust_env=False)
            assert health.status_code == httpx.codes.OK
        finally:
            killer.join()
            stop_serving("proxy", home=tmp_path / "home")
