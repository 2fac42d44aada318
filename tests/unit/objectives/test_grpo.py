"""GRPO in all its variants is TRL's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graft.core.errors import DataError
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.scoring import outputs_of
from graft.objectives.base import REFERENCE
from graft.objectives.grpo import GrpoObjective
from graft.objectives.sampling import ADVANTAGES, OLD_LOGPROBS
from graft.testing import tiny_model, tiny_tokenizer
from tests.unit.objectives._trl import assert_same, make_trainer, our_step, parts, their_gradients

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own making

REWARDS: Any = [{"metric": "exact_match"}]
SIZE = 3


def objective(**settings: Any) -> GrpoObjective:
    return GrpoObjective.model_validate({"rewards": REWARDS, "group_size": SIZE, **settings})


def make_groups(num_prompts: int, *, old: bool, seed: int = 0) -> list[TokenRow]:
    """Random prompts with `SIZE` answers each, and what GRPO made of them."""
    draw = random.Random(seed)
    rows = []
    for index in range(num_prompts):
        lengths = [draw.randint(3, 6), *(draw.randint(1, 7) for _ in range(SIZE))]
        branch = [number for number, count in enumerate(lengths) for _ in range(count)]
        ids = [draw.randrange(4, 384) for _ in branch]
        row = TokenRow(ids, [k > 0 for k in branch], f"groups:{index}", branch)
        advantages = [draw.gauss(0, 1) for _ in range(SIZE)]
        extra = {ADVANTAGES: [advantages[k - 1] for k in branch if k]}
        if old:  # about what the tiny model says, so that some ratios are clipped and some not
            extra[OLD_LOGPROBS] = [-6.0 + draw.gauss(0, 0.5) for k in branch if k]
        rows.append(row._replace(extra=extra))
    return rows


def padded(lists: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, lists))
    fill = [[0] * (width - len(ids)) for ids in lists]
    ones = [[1] * len(ids) for ids in lists]
    pairs = list(zip(lists, ones, fill, strict=True))
    ids = [f + own if left else own + f for own, _, f in pairs]
    mask = [f + one if left else one + f for _, one, f in pairs]
    return torch.tensor(ids), torch.tensor(mask)


def trl_loss(
    rows: list[TokenRow], folder: Path, temperature: float = 1.0, **settings: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    from trl import GRPOConfig, GRPOTrainer

    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        folder,
        num_generations=2,
        temperature=temperature,
        reference={"reward_funcs": [lambda completions, **_: [0.0] * len(completions)]},
        **settings,
    )
    split = [parts(row) for row in rows]
    prompts, answers = [], []
    for prompt, *group in split:
        prompts += [prompt] * SIZE
        answers += group
    prompt_ids, prompt_mask = padded(prompts, left=True)
    completion_ids, completion_mask = padded(answers, left=False)

    def spread(name: str) -> torch.Tensor:
        flat = iter([value for row in rows for value in (row.extra or {})[name]])
        found = torch.zeros(completion_ids.shape)
        for at, answer in enumerate(answers):
            found[at, : len(answer)] = torch.tensor([next(flat) for _ in answer])
        return found

    whole = torch.cat([prompt_ids, completion_ids], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        base = tiny_model()
        logits = base(input_ids=whole, attention_mask=mask, position_ids=positions).logits
        logprobs = (logits[:, :-1] / temperature).log_softmax(-1)
        each = logprobs.gather(2, whole[:, 1:, None])[..., 0]
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": spread(ADVANTAGES)[:, 0],
        "ref_per_token_logps": each[:, -completion_ids.shape[1] :],
        "num_items_in_batch": completion_mask.sum(),
    }
    if OLD_LOGPROBS in (rows[0].extra or {}):
        inputs["old_per_token_logps"] = spread(OLD_LOGPROBS)
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, their_gradients(trainer.model, loss), trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("old", [False, True])
def test_loss_and_gradients_are_trls(loss_type: Any, old: bool, tmp_path: Path) -> None:
    rows = make_groups(4, old=old)
    loss, gradients, _ = trl_loss(
        rows, tmp_path, loss_type=loss_type, beta=0.1, max_completion_length=9
    )
    ours = our_step(objective(loss_type=loss_type, beta=0.1, max_new_tokens=9), rows)
    assert_same(ours, loss, gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.4},
        {"beta": 0.05, "temperature": 0.7, "use_bias_correction_kl": False},
    ],
)
def test_clipping_divergence_and_temperature_are_trls(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = make_groups(4, old=True)
    loss, gradients, metrics = trl_loss(rows, tmp_path, loss_type="dapo", **settings)
    ours = our_step(objective(**settings), rows)
    assert_same(ours, loss, gradients)
    # Ours are means over prompts, theirs over tokens: of one prompt they are the same.
    loss, gradients, metrics = trl_loss(rows[:1], tmp_path / "one", loss_type="dapo", **settings)
    figures = our_step(objective(**settings), rows[:1])[0].figures
    assert figures["clip_fraction"] == pytest.approx(metrics["clip_ratio/region_mean"][-1])
    assert figures["entropy"] == pytest.approx(metrics["entropy"][-1], abs=1e-5)
    if settings["beta"]:
        assert figures["kl"] == pytest.approx(metrics["kl"][-1], abs=1e-5)
        assert figures["kl"] > 1e-3


def test_what_is_compared_is_clipped_in_part() -> None:
    figures = our_step(objective(), make_groups(4, old=True))[0].figures
    assert 0.1 < figures["clip_fraction"] < 0.9


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_do_not_change_the_loss(loss_type: Any) -> None:
    rows = make_groups(4, old=True)
    chosen = objective(loss_type=loss_type, beta=0.1)
    whole, small = (our_step(chosen, rows, max_tokens=n) for n in (1000, 10))
    assert whole[0].loss == pytest.approx(small[0].loss, abs=1e-7)
    for key, gradient in whole[1].items():
        torch.testing.assert_close(small[1][key], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_rewards_against_the_group(scale: Any) -> None:
    rows = [row._replace(extra=None) for row in make_groups(2, old=False)]
    rewards = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]], dtype=torch.float64)
    nothing = [[0.0] * len(row.targets) for row in rows]
    outputs = outputs_of(rows, nothing, {REFERENCE: nothing})
    found = objective(scale_rewards=scale).experience(outputs, rewards)
    # By hand: (1, 0, 0.5) deviate by 0.5; the six rewards have mean 1.25 and squares of 3.875.
    batch = (3.875 / 5) ** 0.5
    scales = {"group": 0.5 + 1e-4, "batch": batch + 1e-4, "none": 1.0}
    expected = [
        ((0.5, -0.5, 0.0)[k - 1] if at == 0 else 0.0) / scales[scale]
        for at, row in enumerate(rows)
        for k in row.branch or ()
        if k
    ]
    assert found.keys() == {ADVANTAGES}
    assert found[ADVANTAGES].tolist() == pytest.approx(expected)


def test_a_group_of_one_is_refused_in_words() -> None:
    with pytest.raises(
        ValidationError, match="group_size 1: an answer is compared with the others"
    ):
        objective(group_size=1)


def test_a_row_asks_its_prompt_and_knows_the_wanted_answer() -> None:
    template = ChatTemplate(tiny_tokenizer())
    user = Message(role="user", content="lamp?")
    talk = Example(source="t:1", messages=(user, Message(role="assistant", content="on")))
    (row,) = objective().rows(talk, template)
    assert row.asked is not None
    assert (row.asked.reference, row.asked.prompt_ids) == ("on", template.prompt_ids([user]))
    assert row.input_ids[: row.num_prompt_tokens] == row.asked.prompt_ids
    (bare,) = objective().rows(Example(source="t:2", prompt=(user,)), template)
    assert bare.asked is not None
    assert (bare.asked.reference, bare.targets) == ("", [])
    unwanted = Example(source="t:3", prompt=(user,), answer="off", is_wanted=False)
    assert objective().rows(unwanted, template)[0].asked == bare.asked._replace(source="t:3")
    with pytest.raises(DataError, match="t:4: objective 'grpo' samples answers to prompts"):
        objective().rows(Example(source="t:4", text="plain"), template)
