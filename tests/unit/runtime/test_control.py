"""People act on a study: what is possible is done, the rest is refused with what there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial

from graft.core.errors import ConfigError, StoppedError
from graft.core.files import write_json
from graft.core.progress import QUIET
from graft.engine.run_folder import CHECKPOINTS
from graft.recipe.seeds import SEED, SeededSpace
from graft.recipe.space import RecipeSpace
from graft.recipe.tree import Tree
from graft.runtime.attended import Attendant
from graft.runtime.budget import Budget
from graft.runtime.control import apply
from graft.runtime.requests import (
    StudyRequest,
    answer_of,
    leave_request,
    open_requests,
    read_request,
    withdraw_request,
)
from graft.runtime.searcher import StudySearcher, TrialQueue, drop_needless_checkpoints
from graft.runtime.storage import DRIVER
from graft.runtime.study import Study, edit_study, open_study
from graft.runtime.trials import (
    STOPPED_BY_PERSON,
    StudyFacts,
    is_asked_to_leave,
)

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=64
)
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"source": "x/y"},
    "data": {"train": "t.jsonl", "eval": "e.jsonl"},
    "method": {
        "choice": [
            {"type": "lora", "r": {"choice": [2, 4]}},
            {"type": "dora", "r": {"int": [1, 8]}},
        ]
    },
    "train": {"steps": 12, "report_every": 4, "lr": {"log": [1e-4, 1e-2]}},
    "search": {"trials": 4},
}
POINT = {"method": "lora", "method[lora]/r": 4, "train/lr": 1e-3}


def space_of(**search: Any) -> RecipeSpace:
    return RecipeSpace(Tree("recipe.yaml", {**CONTENT, "search": {"trials": 4, **search}}))


@pytest.fixture
def space() -> RecipeSpace:
    return space_of()


@pytest.fixture
def study(space: RecipeSpace, tmp_path: Path) -> Iterator[Study]:
    with open_study(tmp_path / "tiny", space.sections().search, FACTS) as opened:
        opened.enqueue([POINT])
        yield opened


def run_trial(
    study: Study, space: RecipeSpace, outcome: Any, *, steps: int = 4, reason: str | None = None
) -> int:
    asked = study.ask(space)
    assert asked is not None
    study.note(asked.number, executor="packed")
    study.report(asked.number, steps, {"eval/loss": 1.0 + asked.number})
    (study.trial_folder(asked.number) / CHECKPOINTS / f"step-{steps:08}").mkdir(parents=True)
    if outcome is not None:
        study.tell(asked.number, outcome, reason=reason)
        drop_needless_checkpoints(study)
    return asked.number


def do(study: Study, space: RecipeSpace, action: Any, trial: int | None, **values: Any) -> Any:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return apply(study, space, StudyRequest(action=action, trial=trial, values=named))


def test_of_equally_good_trials_the_first_keeps_its_checkpoint(
    study: Study, space: RecipeSpace
) -> None:
    numbers = []
    for _ in range(3):
        asked = study.ask(space)
        assert asked is not None
        study.note(asked.number, executor="packed")
        study.report(asked.number, 4, {"eval/loss": 0.5})
        (study.trial_folder(asked.number) / CHECKPOINTS / "step-00000004").mkdir(parents=True)
        study.tell(asked.number, "complete")
        drop_needless_checkpoints(study)
        numbers.append(asked.number)
    kept = [n for n in numbers if (study.trial_folder(n) / CHECKPOINTS).exists()]
    assert kept == numbers[:1]
    assert study.best().number == numbers[0]


def test_requests_are_found_in_the_order_of_asking(tmp_path: Path) -> None:
    wishes = [StudyRequest(action="stop", trial=n) for n in range(3)]
    paths = [leave_request(tmp_path, wish) for wish in wishes]
    assert open_requests(tmp_path) == paths
    assert [read_request(path) for path in paths] == wishes
    assert withdraw_request(paths[1])
    assert not withdraw_request(paths[1])
    paths[2].write_text("{")
    assert [read_request(path) for path in paths] == [wishes[0], None, None]
    assert open_requests(tmp_path) == [paths[0], paths[2]]


def test_a_running_trial_that_nobody_runs_is_stopped_at_once(
    study: Study, space: RecipeSpace
) -> None:
    number = run_trial(study, space, None)
    answer = do(study, space, "stop", number)
    assert "checkpoint of step 4 is kept: `graft study resume tiny 0`" in answer.words
    assert (study.trial(number).state, study.trial(number).reason) == (
        "stopped",
        STOPPED_BY_PERSON,
    )
    with pytest.raises(ConfigError, match=r"is stopped; only a running one .* there is no running"):
        do(study, space, "stop", number)
    with pytest.raises(ConfigError, match="study 'tiny' has no trial 7; it has trials 0 to 0"):
        do(study, space, "stop", 7)
    with pytest.raises(ConfigError, match="is not being run; there is no search to end"):
        do(study, space, "stop", None)


@pytest.mark.parametrize(
    ("outcome", "reason"), [("stopped", STOPPED_BY_PERSON), ("failed", "its worker was lost")]
)
def test_a_trial_goes_on_under_a_new_number_and_counts_once(
    study: Study, space: RecipeSpace, tmp_path: Path, outcome: Any, reason: str
) -> None:
    old = run_trial(study, space, outcome, reason=reason)
    left = study.num_remaining
    answer = do(study, space, "resume", old)
    assert answer.words == "trial 0 goes on from step 4 as trial 1"
    again = study.trial(answer.trial)
    assert (again.state, again.params, again.steps) == ("running", POINT, 4)
    assert again.reports == {4: 1.0}
    assert again.reason is None
    assert (study.trial_folder(1) / CHECKPOINTS).is_dir()
    assert not study.trial_folder(0).exists()
    assert study.num_remaining == left
    assert [t.number for t in study.trials if t.uses_budget] == [1]
    with pytest.raises(ConfigError, match="trial 0 of study 'tiny' went on as trial 1"):
        do(study, space, "resume", old)
    with pytest.raises(ConfigError, match="is running; there is nothing to take up"):
        do(study, space, "resume", 1)
    (asked,) = study.unfinished(space)
    assert (asked.number, asked.params) == (1, POINT)
    study.report(1, 8, {"eval/loss": 0.5})
    study.tell(1, "complete")
    assert study.best().reports == {4: 1.0, 8: 0.5}


def test_a_paused_trial_waits_for_its_budget_under_its_own_number(
    study: Study, space: RecipeSpace
) -> None:
    number = run_trial(study, space, None)
    study.note(number, paused="search.max_tokens is spent; a larger one goes on")
    words = r"trial 0 of study 'tiny' is paused: search\.max_tokens is spent; a larger one goes on"
    with pytest.raises(ConfigError, match=words):
        do(study, space, "resume", number)
    assert [trial.number for trial in study.trials] == [number]
    assert (study.trial_folder(number) / CHECKPOINTS).is_dir()


def test_a_driver_that_dies_while_a_trial_is_taken_up_loses_none_of_it(
    study: Study, space: RecipeSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    old = run_trial(study, space, "stopped", reason=STOPPED_BY_PERSON)
    with monkeypatch.context() as killing:
        killing.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            do(study, space, "resume", old)
    assert study.trial_folder(old).exists()
    (asked,) = study.unfinished(space)
    assert asked.number == 1
    assert (study.trial_folder(1) / CHECKPOINTS).is_dir()
    assert not study.trial_folder(old).exists()
    assert study.records.origin(1) == old


def test_a_trial_without_a_checkpoint_is_to_be_cloned(study: Study, space: RecipeSpace) -> None:
    run_trial(study, space, "stopped")
    run_trial(study, space, "complete", steps=12)
    with pytest.raises(ConfigError, match=r"the scheduler stopped it.*`graft study clone tiny 0`"):
        do(study, space, "resume", 0)
    with pytest.raises(ConfigError, match="complete: it has done all of its 12 steps"):
        do(study, space, "resume", 1)


def test_a_clone_is_the_next_trial_with_the_changed_values(
    study: Study, space: RecipeSpace
) -> None:
    run_trial(study, space, "complete")
    answer = do(study, space, "clone", 0, train__lr=5e-3, method__r=2)
    assert "trial 1 is proposed with method lora, method[lora]/r 2, train/lr 0.005" in answer.words
    assert study.trial(1).state == "waiting"
    assert study.num_remaining == 3
    asked = study.ask(space)
    assert asked is not None
    assert (asked.number, asked.params) == (
        1,
        {"method": "lora", "method[lora]/r": 2, "train/lr": 5e-3},
    )
    assert study.num_remaining == 2
    do(study, space, "clone", 0)
    same = study.ask(space)
    assert same is not None
    assert same.params == POINT


def test_what_a_clone_newly_opens_is_sampled(study: Study, space: RecipeSpace) -> None:
    run_trial(study, space, "complete")
    do(study, space, "clone", 0, method="dora")
    asked = study.ask(space)
    assert asked is not None
    assert (asked.params["method"], asked.params["train/lr"]) == ("dora", 1e-3)
    assert 1 <= asked.params["method[dora]/r"] <= 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train__lr": 5.0}, r"train/lr: 5.0 is not in log \[0.0001, 0.01\]"),
        ({"method__r": 3}, r"method\[lora\]/r: 3 is not in choice \[2, 4\]"),
        ({"train__steps": 3}, "train.steps is not an open setting of the study.*Open: method"),
        ({"method[dora]/r": 3}, r"method\[dora\]/r is open only where method is dora"),
    ],
)
def test_a_clone_that_cannot_be_is_refused(
    study: Study, space: RecipeSpace, values: dict[str, Any], words: str
) -> None:
    run_trial(study, space, "complete")
    with pytest.raises(ConfigError, match=words):
        do(study, space, "clone", 0, **values)
    assert len(study.trials) == 1


def test_a_clone_past_the_budget_says_what_runs_it(tmp_path: Path) -> None:
    space = space_of(trials=1)
    with open_study(tmp_path / "tiny", space.sections().search, FACTS) as study:
        run_trial(study, space, "complete")
        assert "`graft tune RECIPE --set search.trials=2` runs it" in (
            do(study, space, "clone", 0).words
        )


def test_a_study_is_edited_only_while_nobody_drives_it(space: RecipeSpace, tmp_path: Path) -> None:
    section = space.sections().search
    with open_study(tmp_path / "tiny", section, FACTS) as study:
        run_trial(study, space, None)
        with edit_study(study.folder, section) as edited:
            assert edited is None
    with edit_study(tmp_path / "tiny", section) as edited:
        assert edited is not None
        do(edited, space, "stop", 0)
    with open_study(tmp_path / "tiny", section, FACTS) as study:
        assert study.trial(0).state == "stopped"


class TuneTrials:
    """Tune's controller, as far as a scheduler sees it: its trials, and the word to stop one."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher
        self.trials: dict[str, Any] = {}

    def start(self, trial_id: str, status: str = Trial.RUNNING) -> Any:
        config = self._searcher.suggest(trial_id)
        assert isinstance(config, dict)
        trial = SimpleNamespace(config=config, status=status, trial_id=trial_id)
        trial.is_finished = lambda: trial.status == Trial.TERMINATED
        self.trials[trial_id] = trial
        return trial

    def get_trials(self) -> list[Any]:
        return list(self.trials.values())

    def stop_trial(self, trial: Any) -> None:
        trial.status = Trial.TERMINATED
        self._searcher.on_trial_complete(trial.trial_id, result={})


def attended(
    study: Study, space: RecipeSpace, searched: tuple[Study, RecipeSpace] | None = None
) -> tuple[Any, TuneTrials, TrialQueue]:
    attendant = Attendant(study, space, Budget(study), QUIET, searched=searched)
    queue = TrialQueue(study, space, turn=4, only_begun=searched is not None)
    searcher = StudySearcher(queue, "packed")
    tune = TuneTrials(searcher)

    def look() -> None:
        attendant._looked = -10.0  # as if a second had gone by
        attendant.look(tune, queue, searcher)

    return look, tune, queue


def test_the_driver_stops_resumes_and_clones_as_asked(study: Study, space: RecipeSpace) -> None:
    look, tune, _ = attended(study, space)
    first, second = tune.start("a"), tune.start("b", Trial.PENDING)
    checkpoint = Path(first.config["folder"]) / CHECKPOINTS / "step-00000004"
    checkpoint.mkdir(parents=True)
    of_first = leave_request(study.folder, StudyRequest(action="stop", trial=0))
    of_second = leave_request(study.folder, StudyRequest(action="stop", trial=1))
    look()
    answer = answer_of(study.folder, of_first)
    assert answer is not None
    assert not answer.is_refused
    assert (study.trial(0).state, study.trial(0).reason) == ("stopped", STOPPED_BY_PERSON)
    assert is_asked_to_leave(Path(first.config["folder"]))
    assert checkpoint.exists()
    assert study.trial(1).state == "running"  # its process is only being started
    assert open_requests(study.folder) == [of_second]
    second.status = Trial.RUNNING
    for wish in (
        StudyRequest(action="resume", trial=0),
        StudyRequest(action="clone", trial=0, values={"train.lr": 2e-3}),
        StudyRequest(action="clone", trial=0, values={"train.lr": 2.0}),
    ):
        last = leave_request(study.folder, wish)
    look()
    assert open_requests(study.folder) == []
    assert study.trial(1).state == "stopped"
    refused = answer_of(study.folder, last)
    assert refused is not None
    assert refused.is_refused
    assert "is not in log" in refused.words
    taken_up = tune.start("c")
    assert (taken_up.config["trial"], taken_up.config["params"]) == (2, POINT)
    assert not is_asked_to_leave(Path(taken_up.config["folder"]))
    assert tune.start("d").config["params"] == {**POINT, "train/lr": 2e-3}


def test_the_tokens_of_a_trial_that_goes_on_are_counted_once(
    study: Study, space: RecipeSpace
) -> None:
    asked = study.ask(space)
    assert asked is not None
    study.note(asked.number, executor="packed", tokens=700)
    study.report(asked.number, 4, {"eval/loss": 1.0})
    (study.trial_folder(asked.number) / CHECKPOINTS / "step-00000004").mkdir(parents=True)
    study.tell(asked.number, "stopped", reason=STOPPED_BY_PERSON)
    budget = Budget(study)
    leave_request(study.folder, StudyRequest(action="resume", trial=asked.number))
    write_json(study.folder / DRIVER, {})
    Attendant(study, space, budget, QUIET).begin()
    assert study.trial(0).continued_by == 1
    assert budget.spending.tokens == 700  # as this driver counts, who let it go on
    assert Budget(study).spending.tokens == 700  # and as the next one does


def test_a_trial_in_line_is_stopped_before_it_is_run(study: Study, space: RecipeSpace) -> None:
    run_trial(study, space, None)
    look, tune, _ = attended(study, space)
    leave_request(study.folder, StudyRequest(action="stop", trial=0))
    look()
    assert study.trial(0).state == "stopped"
    assert tune.start("a").config["trial"] == 1


def test_the_search_ends_and_says_what_is_left(study: Study, space: RecipeSpace) -> None:
    run_trial(study, space, "complete")
    look, tune, _ = attended(study, space)
    trial = tune.start("a")
    path = leave_request(study.folder, StudyRequest(action="stop"))
    with pytest.raises(StoppedError, match=r"1 of 4 trials have ended, half-trained .*\(trial 1\)"):
        look()
    assert answer_of(study.folder, path) is not None
    assert is_asked_to_leave(Path(trial.config["folder"]))
    assert study.trial(1).state == "running"


def test_what_was_asked_of_an_earlier_driver_is_done_but_not_its_end(
    space: RecipeSpace, tmp_path: Path
) -> None:
    folder, section = tmp_path / "tiny", space.sections().search
    with open_study(folder, section, FACTS) as study:
        run_trial(study, space, None)
    asked = [leave_request(folder, StudyRequest(action="stop", trial=n)) for n in (0, None)]
    with open_study(folder, section, FACTS) as study:
        Attendant(study, space, Budget(study), QUIET).begin()
        answers = [answer_of(folder, path) for path in asked]
        assert [a.is_refused for a in answers if a is not None] == [False, True]
        assert study.trial(0).state == "stopped"
    assert open_requests(folder) == []


@pytest.fixture
def reruns(study: Study, space: RecipeSpace) -> Iterator[Study]:
    """Of a search with a complete trial and one that failed: two re-runs, begun."""
    run_trial(study, space, "complete", steps=12)
    run_trial(study, space, "failed", reason="its worker was lost")
    folder = study.folder / "tiny-finalists"
    with open_study(folder, space_of(trials=2).sections().search, FACTS) as opened:
        for seed in (1, 2):
            opened.enqueue_rerun(0, {**POINT, SEED: seed})
            opened.ask(SeededSpace(space))
        yield opened


def test_the_end_of_a_search_is_the_end_of_its_finalists_too(
    study: Study, reruns: Study, space: RecipeSpace
) -> None:
    look, tune, _ = attended(reruns, SeededSpace(space), searched=(study, space))
    first, second = tune.start("a"), tune.start("b")
    reruns.report(0, 12, {"eval/loss": 1.0})
    reruns.tell(0, "complete")
    first.status = Trial.TERMINATED
    path = leave_request(study.folder, StudyRequest(action="stop"))
    words = (
        r"study 'tiny' while its finalists were trained again: 1 of 2 re-runs have ended, "
        r"half-trained ones keep their checkpoints \(re-run 1\)"
    )
    with pytest.raises(StoppedError, match=words):
        look()
    assert answer_of(study.folder, path) is not None
    assert is_asked_to_leave(Path(second.config["folder"]))
    assert not is_asked_to_leave(Path(first.config["folder"]))
    assert reruns.trial(1).state == "running"  # the next driver goes on with it
    assert [t.state for t in study.trials] == ["complete", "failed"]


def test_what_is_asked_of_a_search_beside_its_finalists_waits_for_the_next_driver(
    study: Study, reruns: Study, space: RecipeSpace
) -> None:
    look, tune, _ = attended(reruns, SeededSpace(space), searched=(study, space))
    tune.start("a")
    paths = [
        leave_request(study.folder, StudyRequest(action=action, trial=1))
        for action in ("stop", "resume", "clone")
    ]
    look()
    refused, resumed, cloned = (answer_of(study.folder, path) for path in paths)
    assert refused is not None
    assert refused.words.startswith("trial 1 of study 'tiny' is failed; only a running one")
    assert resumed is not None
    assert resumed.words.endswith("trained now; the next `graft tune` runs it")
    assert cloned is not None
    states = [trial.state for trial in study.trials]
    assert states == ["complete", "failed", "running", "waiting"]
    assert [trial.state for trial in reruns.trials] == ["running", "running"]
