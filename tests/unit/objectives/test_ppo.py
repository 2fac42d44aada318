"""PPO by hand: advantages, clipping, divergence and values, each on a worked batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graft.data.records import TokenRow
from graft.engine.scoring import outputs_of
from graft.objectives.base import REFERENCE, TokenOutputs
from graft.objectives.ppo import OLD_VALUES, RETURNS, PpoObjective, generalized_advantages
from graft.objectives.sampling import ADVANTAGES, OLD_LOGPROBS


def objective(**settings: Any) -> PpoObjective:
    return PpoObjective.model_validate({"rewards": [{"metric": "exact_match"}], **settings})


ROW = TokenRow([9, 9, 1, 2, 3, 4], [False] * 2 + [True] * 4, "p:1", [0, 0, 1, 1, 1, 1])
"""One prompt and one answer of four tokens."""


def outputs(
    logprobs: list[float],
    *,
    values: list[float] | None = None,
    rows: tuple[TokenRow, ...] = (ROW,),
    **extra: list[float],
) -> TokenOutputs:
    """What the model makes of rows with four targets each."""

    def split(flat: list[float]) -> list[list[float]]:
        return [flat[4 * at : 4 * at + 4] for at in range(len(rows))]

    carried = {name: split(flat) for name, flat in extra.items()}
    found = outputs_of(rows, split(logprobs), carried, split(values or [0.0] * 4 * len(rows)))
    found.logprobs_P.requires_grad_()
    assert found.values_P is not None
    found.values_P.requires_grad_()
    return found


def test_advantages_of_a_hand_worked_episode_of_four_steps() -> None:
    # gamma 0.5, lam 0.5. Surprises: 1 + 0.5*2 - 1 = 1; 0 + 0.5*4 - 2 = 0; 2 + 0.5*0 - 4 = -2;
    # 4 - 0 = 4. Backwards with 0.25: 4; -2 + 1 = -1; 0 - 0.25 = -0.25; 1 - 0.0625 = 0.9375.
    found = generalized_advantages(
        [1.0, 0.0, 2.0, 4.0],
        [1.0, 2.0, 4.0, 0.0],
        [False, False, False, True],
        gamma=0.5,
        lam=0.5,
    )
    assert found == [0.9375, -0.25, -1.0, 4.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.0), (0.97, 0.8)])
def test_advantages_are_the_closed_form_and_episodes_do_not_meet(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    episodes = [range(5), range(5, 6), range(6, 11)]
    is_last = [at in (4, 5, 10) for at in range(11)]
    found = generalized_advantages(rewards.tolist(), values.tolist(), is_last, gamma=gamma, lam=lam)
    for episode in episodes:
        for start in episode:
            expected = 0.0
            for at in range(start, episode[-1] + 1):  # the sum of discounted surprises
                after = values[at + 1] if at < episode[-1] else 0.0
                surprise = rewards[at] + gamma * after - values[at]
                expected += (gamma * lam) ** (at - start) * float(surprise)
            assert found[start] == pytest.approx(expected, abs=1e-12)
    if gamma == lam == 1:  # all rewards to come, less the value
        assert found[0] == pytest.approx(float(rewards[:5].sum() - values[0]), abs=1e-12)


def test_what_an_answer_earns_comes_last_and_divergence_is_taken_off_at_each_token() -> None:
    chosen = objective(beta=0.5, gamma=1.0, lam=1.0, whitens_advantages=False)
    sampled = outputs(
        [-1.0, -2.0, -1.0, -3.0],
        values=[0.5, 0.0, 1.0, 2.0],
        **{REFERENCE: [-1.0, -3.0, -3.0, -3.0]},
    )
    found = chosen.experience(sampled, torch.tensor([[4.0]], dtype=torch.float64))
    # Rewards 0, -0.5, -1, 4; to come 2.5, 2.5, 3, 4.
    assert found[RETURNS].tolist() == pytest.approx([2.5, 2.5, 3.0, 4.0])
    assert found[ADVANTAGES].tolist() == pytest.approx([2.0, 2.5, 2.0, 2.0])
    assert found[OLD_LOGPROBS].tolist() == [-1.0, -2.0, -1.0, -3.0]
    assert found[OLD_VALUES].tolist() == [0.5, 0.0, 1.0, 2.0]


def test_each_answer_of_a_group_is_an_episode_of_its_own() -> None:
    group = ROW._replace(branch=[0, 0, 1, 1, 2, 2])
    chosen = objective(beta=0.0, gamma=1.0, lam=1.0, whitens_advantages=False)
    sampled = outputs([-1.0] * 8, rows=(group, ROW), **{REFERENCE: [-1.0] * 8})
    rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    found = chosen.experience(sampled, rewards)
    assert found[RETURNS].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    sampled = outputs([-1.0, -2.0, -1.0, -3.0], **{REFERENCE: [-2.0, -1.0, -1.5, -3.0]})
    rewards = torch.tensor([[2.0]], dtype=torch.float64)
    found = objective().experience(sampled, rewards)
    raw = objective(whitens_advantages=False).experience(sampled, rewards)
    assert float(found[ADVANTAGES].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found[ADVANTAGES].std()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(found[RETURNS], raw[RETURNS])


def carried(advantages: list[float], **more: list[float]) -> dict[str, list[float]]:
    return {
        ADVANTAGES: advantages,
        RETURNS: [0.0] * 4,
        OLD_LOGPROBS: [0.0] * 4,
        OLD_VALUES: [0.0] * 4,
        REFERENCE: [0.0] * 4,
        **more,
    }


def test_likelihoods_that_moved_far_in_the_wanted_direction_are_clipped() -> None:
    # Ratios 1.5, 1.5, 0.5, 0.5 with advantages 2, -2, 2, -2 and epsilon 0.2: the first is held at
    # 1.2 (-2.4), the second counts (3), the third counts (-1), the fourth is held at 0.8 (1.6).
    moved = [math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]
    given = outputs(moved, **carried([2.0, -2.0, 2.0, -2.0]))
    loss = objective(value_coefficient=0.0).loss(given)
    assert loss.tolist() == pytest.approx([-2.4 + 3.0 - 1.0 + 1.6])
    assert objective().figures(given)["clip_fraction"].tolist() == [0.5]
    loss.sum().backward()
    assert given.logprobs_P.grad is not None
    # The gradient of a ratio by its log-probability is the ratio itself.
    assert given.logprobs_P.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0])


def test_values_that_moved_far_are_clipped_where_they_would_overshoot() -> None:
    # Values 0.5, 0.1, -1, 3 from 0 with epsilon 0.2, returns 1, 1, 1, 1: errors 0.25 or 0.64;
    # 0.81; 4 or 1.44; 4 or 0.64. The larger counts, halved.
    more = {RETURNS: [1.0] * 4}
    given = outputs([0.0] * 4, values=[0.5, 0.1, -1.0, 3.0], **carried([0.0] * 4, **more))
    chosen = objective(value_coefficient=0.1)
    loss = chosen.loss(given)
    assert loss.tolist() == pytest.approx([0.1 * 0.5 * (0.64 + 0.81 + 4.0 + 4.0)])
    assert chosen.figures(given)["value_loss"].tolist() == pytest.approx([0.5 * 9.45 / 4])
    loss.sum().backward()
    assert given.values_P is not None
    assert given.values_P.grad is not None
    # The first is held, the second free: 0.1 * (value - return).
    assert given.values_P.grad.tolist() == pytest.approx([0.0, -0.09, -0.2, 0.2])


def test_without_advantage_the_values_alone_move() -> None:
    given = outputs([-0.3] * 4, values=[1.0] * 4, **carried([0.0] * 4))
    objective().loss(given).sum().backward()
    assert given.values_P is not None
    assert given.values_P.grad is not None
    assert given.logprobs_P.grad is not None
    assert bool((given.values_P.grad != 0).all())
    assert not given.logprobs_P.grad.any()


def test_where_nothing_is_earned_the_divergence_alone_moves_the_policy() -> None:
    rewards = torch.zeros(1, 1, dtype=torch.float64)
    same, apart = [-1.0] * 4, [-1.0, -1.0, -2.0, -1.0]
    for beta, reference, moves in ((0.5, same, False), (0.0, apart, False), (0.5, apart, True)):
        chosen = objective(beta=beta, gamma=1.0, lam=0.0, whitens_advantages=False)
        sampled = outputs([-1.0] * 4, **{REFERENCE: reference})
        found = chosen.experience(sampled, rewards)
        extra = {name: value.tolist() for name, value in found.items()}
        given = outputs([-1.0] * 4, **{REFERENCE: reference, **extra})
        chosen.loss(given).sum().backward()
        assert given.logprobs_P.grad is not None
        # Where the slot says a token more often than the reference does, it is to say it less.
        expected = [0.0, 0.0, 0.5, 0.0] if moves else [0.0] * 4
        assert given.logprobs_P.grad.tolist() == pytest.approx(expected)


def test_divergence_is_the_estimator_that_is_never_below_0() -> None:
    given = outputs([-1.0, -2.0, -1.0, -1.0], **carried([0.0] * 4, **{REFERENCE: [-1.0] * 4}))
    expected = (0.0 + (math.exp(1.0) - 1.0 - 1.0) + 0.0 + 0.0) / 4
    assert objective().figures(given)["kl"].tolist() == pytest.approx([expected])
