"""The finalists of a search: who they are, on which seeds, what they come to, in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError, TrainingError
from graft.engine.run_folder import CHECKPOINTS
from graft.pipelines.finals import (
    choose_finalists,
    finals_folder,
    read_finals,
    rerun_folder,
    run_finals,
    t_interval,
    verdict,
)
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.sections import SearchSection
from graft.recipe.seeds import SEED, SeededSpace
from graft.recipe.space import RecipeSpace
from graft.report.finals_facts import FinalistFacts, Finals, RerunFacts
from graft.runtime.searcher import TrialQueue
from graft.runtime.study import Study, open_study, read_study
from graft.runtime.trials import Asked, StudyFacts, TrialRecord

FACTS = StudyFacts(space="s", model="m", data="d", objectives=("eval/loss min",), eval_rows=8)
RANKS = (2, 4, 8)

Loss = Callable[[Asked], float | None]
"""What a trial comes to; None breaks it."""


def make_space(folder: Path, **sections: Any) -> RecipeSpace:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "base"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "method": {"type": "lora", "r": {"choice": list(RANKS)}},
        "train": {"steps": 4},
        "search": {"trials": 3, "finalists": 2, "finalist_seeds": 3, "sampler": "random"},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(content))
    return load_recipe(path)


def train(study: Study, space: Any, loss: Loss, stop_after: int | None = None) -> list[Asked]:
    """An executor in a few lines: trains what a study has begun, in order."""
    done = []
    for asked in study.unfinished(space):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        value = loss(asked)
        done.append(asked)
        if value is None:
            study.tell(asked.number, "failed", reason="loss is not finite")
            continue
        (study.trial_folder(asked.number) / CHECKPOINTS / "step-4").mkdir(parents=True)
        study.report(asked.number, 4, {"eval/loss": value})
        study.tell(asked.number, "complete")
    return done


def search(study: Study, space: RecipeSpace, losses: dict[int, float]) -> None:
    """Tries every rank."""
    study.enqueue([{"method/r": r} for r in RANKS])
    for _ in RANKS:
        study.ask(space)
    train(study, space, lambda asked: losses[asked.params["method/r"]])


@pytest.fixture
def space(tmp_path: Path) -> RecipeSpace:
    return make_space(tmp_path)


@pytest.fixture
def study(space: RecipeSpace, tmp_path: Path) -> Iterator[Study]:
    """A search of three trials that is over: 8 is best, then 4, then 2."""
    with open_study(tmp_path / "studies" / "tiny", space.sections().search, FACTS) as opened:
        search(opened, space, {2: 0.9, 4: 0.51, 8: 0.5})
        yield opened


def finals_of(study: Study, space: RecipeSpace, loss: Loss) -> Finals:
    found = run_finals(study, space, FACTS, train=lambda s, p: train(s, p, loss) and None)
    assert found is not None
    return found


def by_seed(losses: dict[int, list[float | None]]) -> Loss:
    """Losses by rank, one a seed from 1."""
    return lambda asked: losses[asked.params["method/r"]][asked.recipe.train.seed - 1]


def test_the_winner_is_the_finalist_with_the_best_mean_on_seeds_never_seen(
    study: Study, space: RecipeSpace
) -> None:
    before = study.trials
    finals = finals_of(study, space, by_seed({4: [0.52, 0.5, 0.51], 8: [0.6, 0.62, 0.61]}))
    assert [finalist.number for finalist in finals.finalists] == [1, 2]
    assert finals.seeds == (1, 2, 3)
    first = finals.finalists[0]
    assert first.mean == pytest.approx(0.51)
    assert first.searched == 0.51
    assert first.values == [0.52, 0.5, 0.51]
    assert finals.published_seed == 3  # the run at the mean
    assert study.trials == before  # neither budget, sampler nor front has seen a re-run
    assert read_finals(study, space) == finals.model_copy(update={"published_seed": None})


def test_re_runs_are_marked_and_differ_from_their_trial_in_the_seed_alone(
    study: Study, space: RecipeSpace
) -> None:
    done: list[Asked] = []

    def to_the_end(reruns: Study, seeded: RecipeSpace) -> None:
        assert study.section.scheduler.type == "asha"
        assert reruns.section.scheduler.type == "none"  # nobody stops a re-run
        done.extend(train(reruns, seeded, lambda asked: 0.5))

    run_finals(study, space, FACTS, train=to_the_end)
    reruns = read_study(finals_folder(study.folder), study.section)
    assert [(t.rerun_of, t.params[SEED]) for t in reruns.trials] == [
        (2, 1), (2, 2), (2, 3), (1, 1), (1, 2), (1, 3)
    ]  # fmt: skip
    for asked, record in zip(done, reruns.trials, strict=True):
        assert record.rerun_of is not None
        own = space.fix(study.trial(record.rerun_of).params)
        content = asked.recipe.model_dump()
        assert content.pop("train") == {**own.train.model_dump(), "seed": record.params[SEED]}
        assert content == {k: v for k, v in own.model_dump().items() if k != "train"}


def test_an_interrupted_re_run_goes_on_and_none_is_done_twice(
    study: Study, space: RecipeSpace
) -> None:
    first: list[Asked] = []

    def half(reruns: Study, seeded: RecipeSpace) -> None:
        train(reruns, seeded, lambda asked: first.append(asked) or 0.5, stop_after=2)

    with pytest.raises(KeyboardInterrupt):
        run_finals(study, space, FACTS, train=half)
    later: list[Asked] = []
    finals = finals_of(study, space, lambda asked: later.append(asked) or 0.5)
    assert [asked.number for asked in [*first, *later]] == [0, 1, 2, 3, 4, 5]
    assert finals_of(study, space, lambda asked: pytest.fail("done already")) == finals


def test_more_seeds_add_to_those_that_are_done(study: Study, space: RecipeSpace) -> None:
    finals_of(study, space, lambda asked: 0.5)
    study.section = study.section.model_copy(update={"finalist_seeds": 5})
    later: list[Asked] = []
    finals = finals_of(study, space, lambda asked: later.append(asked) or 0.5)
    assert sorted(asked.recipe.train.seed for asked in later) == [4, 4, 5, 5]
    assert [len(finalist.values) for finalist in finals.finalists] == [5, 5]


def test_only_one_run_of_a_finalist_keeps_its_weights(study: Study, space: RecipeSpace) -> None:
    finals = finals_of(study, space, by_seed({4: [0.5, 0.9, 0.6], 8: [0.8, 0.7, 0.6]}))
    kept = list(finals_folder(study.folder).glob(f"trials/*/{CHECKPOINTS}"))
    first, second = finals.finalists
    assert finals.published_seed == 3
    nearest = [rerun_folder(study, first, 3), rerun_folder(study, second, 2)]
    assert sorted(kept) == sorted(folder / CHECKPOINTS for folder in nearest)
    # The weights that are gone are not chosen, though a fourth seed moves the mean to them.
    study.section = study.section.model_copy(update={"finalist_seeds": 4})
    again = finals_of(study, space, by_seed({4: [0.5, 0.9, 0.6, 1.2], 8: [0.8, 0.7, 0.6, 1.4]}))
    assert again.finalists[0].mean == pytest.approx(0.8)
    assert again.published_seed == 3


def test_of_two_runs_the_better_one_is_published(tmp_path: Path) -> None:
    space = make_space(
        tmp_path, search={"trials": 3, "finalists": 1, "finalist_seeds": 2, "sampler": "random"}
    )
    with open_study(tmp_path / "studies" / "two", space.sections().search, FACTS) as study:
        search(study, space, {2: 0.9, 4: 0.51, 8: 0.5})
        finals = finals_of(study, space, by_seed({8: [0.7, 0.1]}))
    assert finals.published_seed == 2
    assert "three seeds make it 4" in finals.verdict


def test_a_finalist_that_breaks_on_a_seed_loses_to_one_that_does_not(
    study: Study, space: RecipeSpace
) -> None:
    finals = finals_of(study, space, by_seed({4: [0.6, 0.6, 0.6], 8: [0.1, None, 0.1]}))
    first, second = finals.finalists
    assert (first.number, second.number) == (1, 2)
    assert [rerun.state for rerun in second.reruns] == ["complete", "failed", "complete"]
    assert "trial 2 did not complete every re-run" in finals.verdict


def test_no_winner_is_named_where_every_re_run_breaks(study: Study, space: RecipeSpace) -> None:
    with pytest.raises(TrainingError, match=r"loss is not finite. search.finalists=0 publishes"):
        finals_of(study, space, lambda asked: None)


def test_a_search_over_seeds_is_re_run_on_seeds_that_it_has_not_drawn(tmp_path: Path) -> None:
    space = make_space(tmp_path, train={"steps": 4, "seed": {"choice": [3, 40]}})
    with open_study(tmp_path / "studies" / "seeds", space.sections().search, FACTS) as study:
        study.enqueue([{"method/r": 2, "train/seed": 40}, {"method/r": 4, "train/seed": 3}])
        for _ in range(2):
            study.ask(space)
        train(study, space, lambda asked: 0.5)
        done: list[Asked] = []
        finals = finals_of(study, space, lambda asked: done.append(asked) or 0.5)
    assert finals.seeds == (41, 42, 43)
    assert {asked.recipe.train.seed for asked in done} == {41, 42, 43}


def test_a_recipe_without_finalists_trains_nothing_again(tmp_path: Path) -> None:
    space = make_space(tmp_path, search={"trials": 3, "sampler": "random"})
    with open_study(tmp_path / "studies" / "none", space.sections().search, FACTS) as study:
        search(study, space, {2: 0.9, 4: 0.51, 8: 0.5})
        unused: Any = None
        assert run_finals(study, space, FACTS, train=unused) is None
        assert not finals_folder(study.folder).exists()


def test_finalists_are_complete_best_first_and_of_different_settings() -> None:
    def record(number: int, r: int, value: float, state: Any = "complete") -> TrialRecord:
        return TrialRecord(
            number=number, state=state, params={"r": r}, metrics={"eval/exact_match": value}
        )

    trials = [
        record(0, 2, 0.5),
        record(1, 4, 0.99, "stopped"),
        record(2, 8, 0.7),
        record(3, 8, 0.7),
        record(4, 16, 0.6),
    ]
    section = SearchSection.model_validate(
        {"finalists": 2, "objectives": [{"metric": "eval/exact_match", "mode": "max"}]}
    )
    assert [t.number for t in choose_finalists(trials, section)] == [2, 4]


def test_the_interval_is_students_on_his_own_data() -> None:
    # Hours of sleep gained, from the paper of 1908; R's t.test prints 0.7001142 and 2.4598858.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert t_interval(gained, 0.95) == pytest.approx((0.7001142, 2.4598858))
    assert t_interval([1.0], 0.95) is None


def finalist(number: int, values: list[float | None]) -> FinalistFacts:
    known = [value for value in values if value is not None]
    low, high = t_interval(known, 0.95) or (None, None)
    return FinalistFacts(
        number=number,
        params={},
        searched=0.0,
        reruns=tuple(
            RerunFacts(seed=s, state="failed" if v is None else "complete", value=v)
            for s, v in enumerate(values, 1)
        ),
        mean=sum(known) / len(known) if known else None,
        low=low,
        high=high,
    )


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([[0.3, 0.31, 0.32]], "trial 0 is better than trial 1: its 95% interval over 3 seeds"),
        ([[0.13, 0.1, 0.12]], "trial 0 has the best mean, but is not told apart from trial 1:"),
        (
            [[0.13, 0.1, 0.12], [0.12, 0.11, 0.13], [0.5, 0.5, 0.5]],
            "is not told apart from trials 1, 2: their 95% intervals over 3 seeds overlap",
        ),
        ([[0.1, None, 0.1]], "trial 0 is the only finalist that was trained on 3 seeds; trial 1"),
        ([], "trial 0 is the only finalist that was trained on 3 seeds"),
    ],
)
def test_the_verdict_says_what_is_told_apart(others: list[list[float | None]], words: str) -> None:
    finalists = [finalist(0, [0.1, 0.11, 0.12])]
    finalists += [finalist(number, values) for number, values in enumerate(others, 1)]
    assert words in verdict(finalists, 0.95)


def test_what_is_begun_is_all_that_a_queue_of_re_runs_gives(
    study: Study, space: RecipeSpace, tmp_path: Path
) -> None:
    with open_study(tmp_path / "empty", study.section, FACTS) as other:
        assert other.num_remaining == 3
        assert TrialQueue(other, space, turn=4, only_begun=True).turn_of() is None
        assert other.trials == []


def test_a_seeded_space_knows_its_seed_like_any_other_parameter(space: RecipeSpace) -> None:
    seeded = SeededSpace(space)
    recipe = seeded.fix({"method/r": 4, SEED: 7})
    assert recipe.train.seed == 7
    assert seeded.params_of(recipe) == {"method/r": 4, SEED: 7}
    assert SEED not in space.holes
    with pytest.raises(ConfigError, match=f"no value for {SEED}"):
        seeded.fix({"method/r": 4})


def test_more_finalists_than_trials_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finalists 4 of 3 trials; ask for 3 at most, or raise"):
        make_space(tmp_path, search={"trials": 3, "finalists": 4})
    with pytest.raises(ConfigError, match=r"search\.finalist_seeds"):
        make_space(tmp_path, search={"trials": 3, "finalists": 1, "finalist_seeds": 1})
