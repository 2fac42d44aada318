from typing import Any

import pytest
import torch

from graft.engine.evaluate import row_losses
from graft.engine.lanes import Lanes, divide, run_in_lanes
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.methods.mixture import MixtureMethod
from graft.recipe import Recipe
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows

CPU = torch.device("cpu")
ROWS = make_rows(24, lengths=(9, 40))
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4, "lora_dropout": 0.2},
    "dora": {"type": "dora", "r": 2},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3},
    "bottleneck": {"type": "bottleneck", "reduction_factor": 8},
    "adalora": {"type": "adalora", "init_r": 4, "target_r": 2},
}


def recipe(method: dict[str, Any], **train: Any) -> Recipe:
    return make_recipe(
        method=method, train={"steps": 12, "batch_size": 12, "lr": 2e-3, "seed": 3, **train}
    )


def trained(*, recompute: bool = False) -> tuple[dict[str, Any], list[float]]:
    """A pack of five methods after four steps: its weights and its losses."""
    model = MultiAdapterModel(exact_model())
    if recompute:
        recompute_layers(model)
    trainer = Trainer(model)
    for name, method in METHODS.items():
        trainer.join(name, recipe(method), ROWS)
    losses = [report.loss for _ in range(4) for report in trainer.step().values()]
    weights = {
        f"{name}.{key}": value
        for name in METHODS
        for key, value in trainer.backend.parameters(name).items()
    }
    return weights, losses


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", [2, 3])
def test_lanes_train_to_the_same_weights(threads: Any, number: int, recompute: bool) -> None:
    threads(1)
    alone, alone_losses = trained(recompute=recompute)
    threads(number)
    side_by_side, losses = trained(recompute=recompute)
    assert losses == pytest.approx(alone_losses, abs=1e-10)
    for key, value in alone.items():
        torch.testing.assert_close(side_by_side[key], value, rtol=0, atol=1e-10)


def test_the_order_of_the_threads_changes_no_bit(threads: Any) -> None:
    threads(4)
    (first, losses), (second, again) = trained(), trained()
    assert losses == again
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_rows_are_divided_equally_within_what_memory_holds(threads: Any) -> None:
    threads(2)
    assert divide(100, 2048, CPU) == Lanes(1, 2048)
    assert divide(1000, 2048, CPU) == Lanes(2, 525)
    number, max_tokens = divide(5000, 2048, CPU)
    assert number == 2
    assert 5000 / 6 < max_tokens <= 2048 / 2
    assert divide(5000, 2048, torch.device("cuda")) == Lanes(1, 2048)
    threads(1)
    assert divide(5000, 2048, CPU) == Lanes(1, 2048)


def test_a_lane_that_fails_ends_the_step_and_leaves_threads_and_kernels_as_they_were(
    threads: Any,
) -> None:
    threads(2)
    weight = torch.nn.Parameter(torch.ones(3))
    kernels = torch.backends.cuda.flash_sdp_enabled()

    def broken() -> tuple[torch.Tensor, int]:
        raise ValueError("no such row")

    def sound() -> tuple[torch.Tensor, int]:
        return weight.sum(), 1

    with pytest.raises(ValueError, match="no such row"):
        list(run_in_lanes([sound, broken, sound], [weight], lanes=2, longest=8))
    assert torch.get_num_threads() == 2
    assert torch.backends.cuda.flash_sdp_enabled() == kernels
    assert list(run_in_lanes([sound, sound], [weight], lanes=2, longest=8)) == [1, 1]
    torch.testing.assert_close(weight.grad, torch.full((3,), 3.0))


def test_rows_are_read_in_lanes_as_in_one_pass(threads: Any) -> None:
    model = MultiAdapterModel(exact_model())
    model.add_slot("own", MixtureMethod(r=2, num_experts=3), seed=1)
    losses, seen = [], []
    for number in (1, 2, 3):
        threads(number)
        with model.observed() as observed:
            losses.append(row_losses(model, "own", ROWS))
        seen.append({name: torch.cat(figures).mean(0) for name, figures in observed.items()})
    assert seen[0]
    for found, told in zip(losses[1:], seen[1:], strict=True):
        assert found == [(pytest.approx(total, rel=1e-12), count) for total, count in losses[0]]
        assert told.keys() == seen[0].keys()
        for name, figures in told.items():
            torch.testing.assert_close(figures, seen[0][name])


def test_parameters_that_autograd_gives_one_gradient_do_not_share_it(threads: Any) -> None:
    threads(2)
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    factor = torch.tensor([1.0, 2.0, 3.0])

    def loss() -> tuple[torch.Tensor, None]:
        return ((first + second) * factor).sum(), None

    list(run_in_lanes([loss, loss, loss], [first, second], lanes=2, longest=1))
    for parameter in (first, second):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 3 * factor)
