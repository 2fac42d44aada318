"""The tiny model, tokenizer and data, built once a test run; which tests share a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from graft.testing import save_tiny_model, tiny_dataset, tiny_model, tiny_tokenizer


class OneRayCluster(LoadScopeScheduling):
    """Keeps a file's tests in one process, and all that need Ray: they share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/ray" if file.startswith("tests/ray/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneRayCluster:
    """Tells how tests are spread over processes."""
    return OneRayCluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that need Ray first: one process has them all, and would end last."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/ray/"))


def pytest_configure() -> None:
    """Gives each of several test processes its share of the cores."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer; tests that change it build their own."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model saved as a folder for `model.source`; read only."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny task's `train.jsonl` and `eval.jsonl`; read only."""
    folder = tmp_path_factory.mktemp("tiny-data")
    tiny_dataset(folder)
    return folder


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A fresh tiny model in fp32."""
    return tiny_model()
