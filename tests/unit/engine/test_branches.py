"""Answers that share one prompt's forward pass are read as if each stood alone behind it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graft.data.records import TokenRow
from graft.engine.batches import RoutedRow, collate, micro_batches
from graft.engine.logprobs import supervised_logprobs
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.methods.base import METHODS
from graft.methods.routing import DropoutStream
from tests.unit.engine.conftest import exact_model

CPU = torch.device("cpu")

METHODS_TRIED: list[dict[str, Any]] = [
    {"type": "lora", "r": 4, "lora_dropout": 0.2},
    {"type": "bottleneck"},
    {"type": "prompt", "num_virtual_tokens": 3},
    {"type": "prefix", "num_virtual_tokens": 3},
    {"type": "full"},
]


def branched_row(prompt: int, *answers: int, seed: int = 0) -> TokenRow:
    """A prompt of so many random tokens, and answers of so many each, all supervised."""
    generator = random.Random(seed)
    branch = [0] * prompt + [k for k, n in enumerate(answers, 1) for _ in range(n)]
    ids = [generator.randrange(4, 384) for _ in branch]
    return TokenRow(ids, [k > 0 for k in branch], f"rows:{seed}", branch)


def alone(row: TokenRow, branch: int) -> TokenRow:
    """One answer of a row behind its prompt, as a row that does not branch."""
    return row.take(row.branch_columns(branch))._replace(branch=None)


ROWS = [
    branched_row(6, 4, 7, seed=1),
    branched_row(3, 5, 2, 3, seed=2),
    alone(branched_row(8, 4, seed=3), 1),
    branched_row(2, 9, seed=4),
]


def routed_rows(rows: list[TokenRow], slot: str | None = "own") -> list[RoutedRow]:
    return [RoutedRow(slot, row, position) for position, row in enumerate(rows)]


def stirred_model(method: dict[str, Any]) -> MultiAdapterModel:
    """The fp64 model with a slot that trains and does something."""
    model = MultiAdapterModel(exact_model())
    model.add_slot("own", METHODS.build(method), seed=1, trainable=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters("own").values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def read(
    model: MultiAdapterModel, rows: list[TokenRow], *, shares_prompts: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of all targets, and gradients of a sum that weighs each differently."""
    batch = collate(routed_rows(rows), CPU, shares_prompts=shares_prompts)
    logprobs = supervised_logprobs(model, batch, lambda _, at: DropoutStream(5, 7, at))
    parameters = model.parameters("own")
    weights = torch.linspace(0.5, 2.0, logprobs.shape[0], dtype=logprobs.dtype)
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad((weights * logprobs).sum(), list(trained.values()))
    return logprobs.detach(), dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("method", METHODS_TRIED, ids=lambda method: method["type"])
def test_a_shared_prompt_and_a_repeated_one_give_equal_log_probabilities_and_gradients(
    method: dict[str, Any],
) -> None:
    model = stirred_model(method)
    shared, shared_gradients = read(model, ROWS, shares_prompts=True)
    expanded, expanded_gradients = read(model, ROWS, shares_prompts=False)
    torch.testing.assert_close(shared, expanded, rtol=0, atol=1e-10)
    assert any(bool(g.any()) for g in shared_gradients.values())
    for key, gradient in shared_gradients.items():
        torch.testing.assert_close(gradient, expanded_gradients[key], rtol=0, atol=1e-9)


def test_log_probabilities_equal_a_naive_loop_over_tokens() -> None:
    model = stirred_model({"type": "lora", "r": 4})
    batch = collate(routed_rows(ROWS), CPU)
    with torch.no_grad():
        found = supervised_logprobs(model, batch)
        expected = []
        for row in ROWS:
            for branch in range(1, row.num_branches + 1):
                ids = alone(row, branch).input_ids if row.branch else row.input_ids
                supervised = alone(row, branch).is_supervised if row.branch else row.is_supervised
                line = collate(routed_rows([TokenRow(ids, supervised, "")]), CPU)
                hidden = model.hidden(line.input_ids, routing=routing_of_one())
                for at in range(1, len(ids)):
                    if supervised[at]:
                        logits = model.logits(hidden[0, at - 1])
                        expected.append(float(logits.log_softmax(0)[ids[at]]))
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


def routing_of_one() -> Any:
    from graft.engine.multi import Routing

    return Routing.single("own", 1)


def test_recomputed_layers_keep_the_mask_of_branches() -> None:
    plain, recomputed = (stirred_model({"type": "lora", "r": 4}) for _ in range(2))
    recompute_layers(recomputed)
    _, expected = read(plain, ROWS, shares_prompts=True)
    _, found = read(recomputed, ROWS, shares_prompts=True)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


def test_eager_attention_takes_branches_too() -> None:
    model = stirred_model({"type": "lora", "r": 4})
    shared, _ = read(model, ROWS, shares_prompts=True)
    model.base.set_attn_implementation("eager")
    assert model.shares_prompts
    eager, _ = read(model, ROWS, shares_prompts=True)
    torch.testing.assert_close(shared, eager, rtol=0, atol=1e-5)  # its softmax drops to fp32


def test_padding_and_company_change_nothing() -> None:
    model = stirred_model({"type": "prefix", "num_virtual_tokens": 3})
    together, _ = read(model, ROWS, shares_prompts=True)
    apart = torch.cat([read_alone(model, row, at) for at, row in enumerate(ROWS)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)


def read_alone(model: MultiAdapterModel, row: TokenRow, position: int) -> torch.Tensor:
    batch = collate([RoutedRow("own", row, position)], CPU)
    return supervised_logprobs(model, batch).detach()


def test_the_prompts_own_targets_count_once() -> None:
    row = ROWS[0]._replace(is_supervised=[True] * len(ROWS[0].input_ids))
    shared = collate(routed_rows([row]), CPU)
    expanded = collate(routed_rows([row]), CPU, shares_prompts=False)
    assert shared.supervised_branches.tolist() == expanded.supervised_branches.tolist()
    assert len(row.targets) == len(shared.supervised_rows) == len(row.input_ids) - 1


def test_micro_batches_count_the_lines_that_expanded_rows_take() -> None:
    rows = [branched_row(10, 6, 6, seed=at) for at in range(4)]
    shared = micro_batches(routed_rows(rows), 44, CPU)
    expanded = micro_batches(routed_rows(rows), 64, CPU, shares_prompts=False)
    assert [tuple(batch.input_ids.shape) for batch in shared] == [(2, 22), (2, 22)]
    assert [tuple(batch.input_ids.shape) for batch in expanded] == [(4, 16), (4, 16)]


@pytest.mark.parametrize(
    ("architecture", "settings", "is_shared"),
    [
        ("llama", {}, True),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}, True),
        ("mistral", {"sliding_window": 4}, False),
        ("bloom", {"n_head": 2, "n_layer": 1}, False),
        ("falcon", {"alibi": True}, False),
        ("mamba", {}, False),
    ],
)
def test_a_base_says_whether_branches_may_share_a_prompt(
    architecture: str, settings: dict[str, Any], is_shared: bool
) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if architecture != "gpt2":
        settings = sizes | settings
    config = AutoConfig.for_model(architecture, vocab_size=384, **settings)
    model = MultiAdapterModel(AutoModelForCausalLM.from_config(config))
    assert model.shares_prompts == is_shared


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3_moe"])
def test_sharing_is_exact_where_a_base_says_so(architecture: str) -> None:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=384,
        **({"n_embd": 32, "n_head": 2, "n_layer": 2} if architecture == "gpt2" else SMALL),
    )
    torch.manual_seed(0)
    model = MultiAdapterModel(AutoModelForCausalLM.from_config(config))
    assert model.shares_prompts
    with torch.no_grad():
        found = [
            supervised_logprobs(model, collate(routed_rows(ROWS, None), CPU, shares_prompts=shares))
            for shares in (True, False)
        ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def test_texts_without_a_prompt_do_not_see_each_other() -> None:
    model = stirred_model({"type": "lora", "r": 4})
    row = branched_row(0, 5, 7, seed=9)
    assert len(row.targets) == 10  # the first token of each has none before it
    found = read_alone(model, row, 0)
    expected = torch.cat([read_alone(model, alone(row, k), 0) for k in (1, 2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
