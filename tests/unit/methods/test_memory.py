"""Memory tuning: a frozen index picks few of many experts, and the sum is what the formula says."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from graft.core.errors import ConfigError
from graft.data.records import TokenRow
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.train import Trainer
from graft.methods.memory import MemoryMethod
from graft.testing import tiny_model, tiny_moe
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows

IDS = torch.arange(5, 29)[None] % 300


def stirred(model: MultiAdapterModel, method: MemoryMethod, seed: int = 0) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            k: v if k in method.frozen else v + 0.05 * torch.randn(v.shape, generator=generator)
            for k, v in of_site.items()
        }
        for site, of_site in model.fresh_tensors(method).items()
    }


@torch.no_grad()
def test_it_computes_what_its_formula_says() -> None:
    model = MultiAdapterModel(tiny_model(dtype=torch.float64))
    method = MemoryMethod(
        num_experts=32, r=2, top_k=3, lora_alpha=4.0, target_modules=("layers.1.mlp.down_proj",)
    )
    tensors = stirred(model, method)
    (site,) = tensors
    seen: list[torch.Tensor] = []
    layer = model.base.get_submodule(site)
    layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    model.add_slot("memory", method, tensors=tensors)
    got: list[torch.Tensor] = []
    model.base.get_submodule(site).register_forward_hook(lambda _, args, out: got.append(out))
    model.hidden(IDS, routing=Routing.single("memory", 1))
    own = {key: value.double() for key, value in tensors[site].items()}
    torch.testing.assert_close(own["memory_keys"].norm(dim=1), torch.ones(32).double())
    for token, (x, base) in enumerate(zip(seen[0][0], seen[1][0], strict=True)):
        scores = own["memory_keys"] @ x / x.norm() * math.sqrt(x.shape[0])
        best = scores.topk(3)
        expected = base.clone()
        for weight, m in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            a, b = own["memory_A"][2 * m : 2 * m + 2], own["memory_B"][:, 2 * m : 2 * m + 2]
            expected += weight * 2.0 * (b @ (a @ x))
        torch.testing.assert_close(got[0][0, token], expected, rtol=0, atol=1e-10)


def test_a_bank_has_a_thousand_experts_at_the_mlp_outputs_of_a_few_layers() -> None:
    model = MultiAdapterModel(tiny_model(num_layers=12))
    tensors = model.fresh_tensors(MemoryMethod())
    assert list(tensors) == [f"model.layers.{at}.mlp.down_proj" for at in (7, 8, 9, 10)]
    assert tensors["model.layers.7.mlp.down_proj"]["memory_A"].shape == (1024, 128)


def test_a_base_whose_mlps_are_experts_is_refused_with_the_layers_that_may_be_named() -> None:
    """The last linear layer of its blocks is attention's."""
    model = MultiAdapterModel(tiny_moe())
    with pytest.raises(ConfigError, match=r"method\.target_modules: none .* k_proj, o_proj"):
        MemoryMethod().sites(model.linears)


def test_training_leaves_the_index_and_most_experts_as_they_were() -> None:
    rows = [TokenRow([7, 8, 9, 10], [False, False, True, True], "fact:1")]
    method = {"type": "memory", "num_experts": 256, "top_k": 2}
    recipe = make_recipe(method=method, train={"steps": 3, "batch_size": 1, "lr": 1e-2})
    trainer = Trainer(MultiAdapterModel(tiny_model()))
    trainer.join("a", recipe, rows)
    before = trainer.state("a").tensors
    while trainer.step():
        pass
    after = trainer.state("a").tensors
    for site, of_site in after.items():
        assert torch.equal(of_site["memory_keys"], before[site]["memory_keys"])
        changed = (of_site["memory_B"] != before[site]["memory_B"]).any(0)
        assert 2 <= int(changed.sum()) <= 2 * 4


@pytest.mark.parametrize("lengths", [(12, 12), (5, 40)], ids=["even", "uneven"])
def test_packed_trials_end_with_the_weights_of_the_same_trials_alone(
    lengths: tuple[int, int],
) -> None:
    rows = make_rows(16, lengths=lengths)
    recipes = {
        name: make_recipe(
            method=method, train={"steps": 8, "batch_size": 4, "lr": 5e-3, "seed": seed}
        )
        for name, method, seed in (
            ("a", {"type": "memory", "num_experts": 64, "top_k": 4}, 1),
            ("b", {"type": "memory", "num_experts": 32, "r": 2, "top_k": 1}, 2),
            ("c", {"type": "mixture", "num_experts": 3, "r": 4, "top_k": 2}, 3),
            ("d", {"type": "mixture", "num_experts": 2, "r": 2}, 4),
        )
    }

    def trained(names: tuple[str, ...]) -> dict[str, AdapterTensors]:
        trainer = Trainer(MultiAdapterModel(exact_model()))
        for name in names:
            trainer.join(name, recipes[name], rows)
        while trainer.step():
            pass
        return {name: trainer.state(name).tensors for name in names}

    packed = trained(tuple(recipes))
    for name in recipes:
        alone = trained((name,))[name]
        for site, of_site in alone.items():
            for key, value in of_site.items():
                torch.testing.assert_close(packed[name][site][key], value, rtol=0, atol=1e-10)


def test_more_picked_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="top_k 16 is above num_experts 8; use at most 8"):
        MemoryMethod(num_experts=8)
