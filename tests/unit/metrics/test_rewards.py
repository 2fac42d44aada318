"""Rewards on hand-worked answers, and what ends a step instead of being trained on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ValidationError

from graft.core.errors import DataError, TrainingError
from graft.metrics.base import METRICS, Metric, RowOutcome
from graft.metrics.rewards import Reward, reward_names, score_rewards

SOURCES = ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]


class OddMetric(Metric):
    """Scores each answer as it says; what a broken plug-in might do."""

    type: Literal["odd"] = "odd"
    scores: dict[str, Any] = {}
    is_short: bool = False
    is_bare: bool = False

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def score(self, rows: list[RowOutcome]) -> Any:
        """Looks the answers up; one that it does not know is a KeyError."""
        found = [self.scores[row.answer or ""] for row in rows]
        if self.is_bare:
            return found
        return 0.0, found[: len(found) - self.is_short]


def rows(*pairs: tuple[str, str]) -> list[RowOutcome]:
    return [RowOutcome(reference, answer, None, None) for reference, answer in pairs]


def reward(metric: Any, weight: float = 1.0) -> Reward:
    return Reward(
        metric=metric if isinstance(metric, Metric) else METRICS.build(metric), weight=weight
    )


def test_the_total_is_the_weighted_sum_and_each_metric_is_told_apart() -> None:
    rewards = [
        reward("exact_match", 2.0),
        reward("json_valid", 0.5),
        reward({"type": "regex", "pattern": "lamp"}, -1.0),
        reward({"type": "regex", "pattern": "fan"}, 0.0),
    ]
    answers = rows(('{"a": 1}', '{"a":1}'), ('{"a": 1}', "[2]"), ("fan", "the lamp"))
    scored = score_rewards(rewards, answers, SOURCES)
    assert scored.totals == [2.5, 0.5, -1.0]
    assert scored.by_reward == {
        "exact_match": [1, 0, 0],
        "json_valid": [1, 1, 0],
        "regex": [0, 0, 1],
        "regex_2": [0, 0, 0],
    }
    assert reward_names(rewards) == list(scored.by_reward)


def test_a_reward_is_read_from_a_name_or_a_mapping_and_travels() -> None:
    named = Reward.model_validate({"metric": "exact_match"})
    assert named == reward("exact_match", 1.0)
    full = Reward.model_validate({"metric": {"type": "regex", "pattern": "a"}, "weight": 0.5})
    assert Reward.model_validate_json(full.model_dump_json()) == full


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_a_metric_of_the_loss_is_no_reward(name: str) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' measures the loss .* choose of contains"):
        Reward.model_validate({"metric": name})


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_is_a_finite_number(weight: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        reward("exact_match", weight)


@pytest.mark.parametrize(
    ("score", "shown"),
    [(math.nan, "nan"), (-math.inf, "-inf"), (None, "None"), ("1", "'1'"), ([1.0], r"\[1\.0\]")],
)
def test_a_score_that_is_no_finite_number_names_metric_and_row(score: Any, shown: str) -> None:
    odd = OddMetric(scores={"a": 1.0, "b": score})
    words = rf"reward 'odd' gave {shown} for the answer 'b' to train\.jsonl:2; a score is one"
    with pytest.raises(TrainingError, match=words):
        score_rewards([reward(odd)], rows(("", "a"), ("", "b")), SOURCES[:2])


def test_a_metric_that_raises_names_metric_row_and_cause() -> None:
    odd = OddMetric(scores={"a": 1.0})
    words = r"reward 'odd' cannot score the answer 'z+\.\.\.' to train\.jsonl:2: KeyError: 'zz"
    with pytest.raises(TrainingError, match=words):
        score_rewards([reward(odd)], rows(("", "a"), ("", "z" * 99), ("", "y")), SOURCES)


def test_a_metric_that_would_end_the_process_is_refused_like_one_that_raises() -> None:
    class Leaving(OddMetric):
        def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
            raise SystemExit(0)

    words = r"cannot score the answer 'a' to train\.jsonl:1: SystemExit: 0"
    with pytest.raises(TrainingError, match=words):
        score_rewards([reward(Leaving(scores={}))], rows(("", "a")), SOURCES[:1])


def test_a_row_that_a_metric_refuses_stays_a_fault_of_the_data() -> None:
    strict = reward({"type": "exact_match", "compare": "json"})
    words = r"cannot score the answer '1' to train\.jsonl:2: the reference 'plain' is not JSON"
    with pytest.raises(DataError, match=words):
        score_rewards([strict], rows(("1", "1"), ("plain", "1")), SOURCES[:2])


def test_a_wrong_number_of_scores_is_refused() -> None:
    odd = OddMetric(scores={"a": 1.0}, is_short=True)
    words = r"'odd' gave 1 scores for 2 answers \(train\.jsonl:1 to train\.jsonl:2\)"
    with pytest.raises(TrainingError, match=words):
        score_rewards([reward(odd)], rows(("", "a"), ("", "a")), SOURCES[:2])


def test_a_metric_without_a_mean_beside_its_scores_is_refused() -> None:
    odd = OddMetric(scores={"a": 1.0}, is_bare=True)
    words = (
        r"'odd' gave \[1\.0, .* for 3 answers \(train\.jsonl:1 to train\.jsonl:3\); a metric gives "
        "a mean and a list of one score a row"
    )
    with pytest.raises(TrainingError, match=words):
        score_rewards([reward(odd)], rows(("", "a"), ("", "a"), ("", "a")), SOURCES)


def test_a_metric_of_another_package_comes_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text(
        "from typing import ClassVar, Literal\n"
        "from graft.metrics.base import METRICS, Metric\n"
        "@METRICS.register\n"
        "class ShoutMetric(Metric):\n"
        "    type: Literal['shout'] = 'shout'\n"
        "    needs: ClassVar = 'generation'\n"
        "    mode: ClassVar = 'max'\n"
        "    def score(self, rows):\n"
        "        scores = [float(row.answer.isupper()) for row in rows]\n"
        "        return sum(scores) / len(scores), scores\n"
    )
    installed = tmp_path / "shouting-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[graft.metric]\nshout = shouting:ShoutMetric\n")
    code = (
        "from graft.metrics.base import RowOutcome\n"
        "from graft.metrics.rewards import Reward, score_rewards\n"
        "reward = Reward.model_validate({'metric': 'shout', 'weight': 3})\n"
        "rows = [RowOutcome('', 'HO', None, None), RowOutcome('', 'ho', None, None)]\n"
        "print(score_rewards([reward], rows, ['a', 'b']).totals)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[3.0, 0.0]"
