"""The whole loop on one machine: search, compress, prove, serve, drift, renewal.

    python examples/smart_home/demo.py [--home FOLDER] [--set A.B=C]

It uses what a user would use: the recipe beside this file, GRAFT's pipelines, an embedded Ray, and
the official OpenAI client. A second run continues from what the first one left in the home.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory_meter import MemoryMeter
from rich.console import Console
from rich.table import Table

from graft.core.process import prepare_process

FOLDER = Path(__file__).resolve().parent
NAME, FULL = "smart-home", "smart-home-full"
CLEAN_PROMPTS = 400
DRIFT_PROMPTS = 360
CLIENTS = 32
STAGES = {
    "check model and data": 0.9,
    "measure the bare base": 0.8,
    "search": 8.5,
    "compress and prove": 1.1,
    "serve and watch": 0.4,
    "clean traffic of two tenants": 2.4,
    "new traffic until the alarm": 0.7,
    "renew": 7.5,
    "report": 0.2,
}
"""What the demo does, with the minutes that each stage took on a machine of two cores."""

console = Console(highlight=False)


class Stages:
    """Says what is done and about how long is left, from how fast this machine was so far."""

    def __init__(self) -> None:
        self._done = 0.0
        self._started = time.monotonic()
        self._number = 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage."""
        self._number += 1
        spent = (time.monotonic() - self._started) / 60
        pace = max(spent / self._done, 0.5) if self._done >= 1.0 else 1.0
        left = max(1, round((sum(STAGES.values()) - self._done) * pace))
        console.rule(
            f"[bold]{self._number}/{len(STAGES)} {name}[/]  ·  about {left} min left", align="left"
        )
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun
        self._done += STAGES[name]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Reads one of the example's data files."""
    with (FOLDER / "data" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def is_same_json(answer: str, wanted: str) -> bool:
    """Whether two texts are the same JSON value."""
    try:
        return bool(json.loads(answer) == json.loads(wanted))
    except ValueError:
        return False


class Tenant:
    """A tenant's own OpenAI client, and what it was answered."""

    def __init__(self, url: str, key: str, model: str) -> None:
        from openai import OpenAI

        self._client = OpenAI(base_url=url, api_key=key, max_retries=2, timeout=120)
        self._model = model
        self.answered_by: dict[str, int] = {}

    def ask(self, row: dict[str, Any]) -> bool:
        """Sends one row's command; returns whether the answer is the wanted action."""
        *prompt, wanted = row["messages"]
        reply = self._client.chat.completions.create(
            model=self._model, messages=prompt, max_tokens=40, temperature=0
        )
        self.answered_by[reply.model] = self.answered_by.get(reply.model, 0) + 1
        return is_same_json(reply.choices[0].message.content or "", wanted["content"])


def send(pairs: Sequence[tuple[Tenant, dict[str, Any]]], label: str, progress: Any) -> list[bool]:
    """Sends requests from many clients at once, in order."""
    with (
        progress.task(label, len(pairs), "request") as task,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        right = []
        for is_right in pool.map(lambda pair: pair[0].ask(pair[1]), pairs):
            right.append(is_right)
            task.advance(right=sum(right) / len(right))
    return right


def measure_base(space: Any, home: Path, progress: Any) -> dict[str, Any]:
    """Evaluates the bare base on the held-out rows, once; a second run reads the figures."""
    from graft.core.files import write_json
    from graft.pipelines.evaluate import evaluate_reference

    file = home / "demo-base.json"
    if not file.exists():
        report = evaluate_reference("base", space.example(), home=home, progress=progress)
        write_json(file, {name: metric.value for name, metric in report.metrics.items()})
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def wait_for(monitor: Any, progress: Any, label: str, done: Any, limit_s: float) -> Any:
    """Follows the monitor's state until `done`, telling each change; none may take longer."""
    import ray

    shown, deadline = "", 0.0
    while True:
        status = ray.get(monitor.status.remote())
        if status.state != shown:
            progress.note(f"{label}: {status.state}")
            shown, deadline = status.state, time.monotonic() + limit_s
        if done(status):
            return status
        if time.monotonic() > deadline:
            raise SystemExit(f"{label}: still {shown} after {limit_s:.0f} s")
        time.sleep(0.5)


def until_alarm(tenant: Tenant, rows: list[dict[str, Any]], monitor: Any, progress: Any) -> int:
    """Sends the new family's commands until the monitor alarms; returns how many it took."""
    import ray

    sent = 0
    for start in range(0, len(rows), CLIENTS):
        part = rows[start : start + CLIENTS]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(tenant.ask, part))
        sent += len(part)
        if ray.get(monitor.status.remote()).num_alarms:
            break
    wait_for(monitor, progress, "monitor", lambda status: status.num_alarms > 0, 300)
    return sent


def run_demo(home: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs all stages; returns the figures."""
    from graft.cli.progress import terminal_progress
    from graft.recipe.load import load_recipe
    from graft.runtime.session import ray_session

    for variable in ("ALICE_KEY", "BOB_KEY"):
        os.environ.setdefault(variable, f"sk-{secrets.token_hex(16)}")
    progress, stages = terminal_progress(), Stages()
    space = load_recipe(FOLDER / "recipe.yaml", overrides)
    figures: dict[str, Any] = {}
    with ray_session():
        refine(space, home, progress, stages, figures)
        serve_and_renew(space, home, progress, stages, figures)
    with stages.stage("report"):
        from graft.pipelines.report import report

        figures["report"] = report(NAME, home=home, progress=progress).path
    figures["seconds"] = {name: round(s, 1) for name, s in stages.seconds.items()}
    return figures


def refine(space: Any, home: Path, progress: Any, stages: Stages, figures: dict[str, Any]) -> None:
    """From data to two registered adapters."""
    from graft.pipelines.check import check
    from graft.pipelines.compress import compress
    from graft.pipelines.run import publish_forms
    from graft.pipelines.tune import tune

    with stages.stage("check model and data"):
        proof = check(space, home=home, progress=progress).data
        console.print(
            f"{proof.train.num_rows} training and {proof.eval.num_rows} held-out rows, "
            "none in both; loss on the answers' tokens only"
        )
    with stages.stage("measure the bare base"):
        figures["base"] = measure_base(space, home, progress)
    with stages.stage("search"):
        tuned = tune(space, home=home, progress=progress)
        figures["trials"] = [
            {"number": t.number, "state": t.state, "steps": t.steps, **t.params}
            for t in tuned.trials
        ]
        figures["best"] = {name: metric.value for name, metric in tuned.metrics.items()}
        figures["held_out_rows"] = max(metric.rows for metric in tuned.metrics.values())
    with stages.stage("compress and prove"):
        small = compress(tuned.artifact, space.fix(tuned.best.params), home=home, progress=progress)
        figures["compressed"] = {name: metric.value for name, metric in small.metrics.items()}
        figures["bytes_fraction"] = small.bytes_fraction
        figures["compressed_bytes"] = small.num_bytes
        figures["parity"] = small.parity.model_dump(mode="json")
        publish_forms(NAME, tuned.artifact, small, home=home)


def serve_and_renew(
    space: Any, home: Path, progress: Any, stages: Stages, figures: dict[str, Any]
) -> None:
    """Two tenants, clean traffic, drift, a successor."""
    import ray

    from graft.pipelines.serve import serve, stop_serving
    from graft.pipelines.watch import watch
    from graft.runtime.monitor import find_monitor

    with stages.stage("serve and watch"):
        watch(space, home=home, name=NAME, renews=True, progress=progress)
        monitor = find_monitor(NAME)
        report = serve(space.sections(), home=home, block=False, progress=progress)
        console.print(f"OpenAI-compatible endpoint: {report.url}")
    alice = Tenant(report.url, os.environ["ALICE_KEY"], NAME)
    bob = Tenant(report.url, os.environ["BOB_KEY"], FULL)
    try:
        with stages.stage("clean traffic of two tenants"):
            rows = read_rows("traffic.jsonl")[:CLEAN_PROMPTS]
            both = [
                (t, row)
                for i, row in enumerate(rows)
                for t in ((alice, bob) if i < 40 else (alice,))
            ]
            right = send(both, "two tenants, two adapters", progress)
            status = ray.get(monitor.status.remote())
            figures["served_exact_match"] = sum(right) / len(right)
            figures["answered_by"] = alice.answered_by | bob.answered_by
            figures["clean_prompts"] = len(rows)
            figures["clean_alarms"] = status.num_alarms
        with stages.stage("new traffic until the alarm"):
            new = read_rows("drift_train.jsonl")[:DRIFT_PROMPTS]
            figures["prompts_to_alarm"] = until_alarm(alice, new, monitor, progress)
        with stages.stage("renew"):
            ended = wait_for(
                monitor, progress, "renewal", lambda s: s.state in ("PROMOTED", "REJECTED"), 3600
            )
            figures["renewal"] = {"state": ended.state, **(ended.evidence or {})}
            alice.answered_by = {}
            held_out = read_rows("drift_eval.jsonl")
            right = send([(alice, row) for row in held_out[:64]], "the successor answers", progress)
            figures["served_after"] = {
                "exact_match": sum(right) / len(right),
                "answered_by": alice.answered_by,
            }
    finally:
        stop_serving(NAME, home=home)


def show(figures: dict[str, Any]) -> None:
    """Prints one table."""
    rows = figures["held_out_rows"]
    gate = figures["renewal"].get("gate") or {}
    parity = figures["parity"]
    table = Table(title="what the demo showed", show_header=False, title_justify="left")
    lines: list[tuple[str, str]] = [
        (
            "trials",
            ", ".join(f"#{t['number']} {t['state']}@{t['steps']}" for t in figures["trials"]),
        ),
        (
            f"exact match, bare base ({rows} held-out rows)",
            _number(figures["base"]["eval/exact_match"]),
        ),
        ("exact match, best adapter", _number(figures["best"]["eval/exact_match"])),
        ("exact match, compressed adapter", _number(figures["compressed"]["eval/exact_match"])),
        (
            "size of the compressed adapter, share of its bf16 bytes",
            _number(figures["bytes_fraction"]),
        ),
        ("parity: greedy tokens the same", _number(parity["token_agreement"])),
        ("parity: mean KL, nats", f"{parity['mean_kl']:.2g}"),
        ("versions that answered the two tenants", ", ".join(figures["answered_by"])),
        ("exact match as served", _number(figures["served_exact_match"])),
        (f"alarms in {figures['clean_prompts']} clean prompts", str(figures["clean_alarms"])),
        ("new prompts until the alarm", str(figures["prompts_to_alarm"])),
        ("renewal", str(figures["renewal"]["state"])),
        ("exact match, new family, champion → successor", _change(gate.get("new"))),
        ("exact match, old families, champion → successor", _change(gate.get("old"))),
        ("new family as served afterwards", _number(figures["served_after"]["exact_match"])),
        ("peak memory of all processes (PSS), GB", _number(figures["peak_memory_gb"])),
        ("minutes", _number(figures["minutes"])),
    ]
    for label, value in lines:
        table.add_row(label, value)
    console.print(table)
    console.print(f"report: {figures['report']}", soft_wrap=True)


def _change(comparison: dict[str, Any] | None) -> str:
    if comparison is None:
        return "—"
    before, after = comparison["champion"]["value"], comparison["successor"]["value"]
    return f"{before:.3f} → {after:.3f}  ({comparison['num_rows']} rows)"


def _number(value: Any) -> str:
    return "—" if value is None else f"{value:.3f}"


def main() -> int:
    """Parses the command line, runs the demo, writes `demo.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".graft/demo"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    prepare_process()
    home = arguments.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    console.print(
        f"This searches, compresses, proves, serves, watches and renews an adapter of a real "
        f"135M-parameter model in {home}: about {round(sum(STAGES.values()))} minutes on 2 cores, "
        "less than 10 GB of memory, no GPU."
    )
    started = time.monotonic()
    with MemoryMeter() as meter:
        figures = run_demo(home, arguments.overrides)
    figures["peak_memory_gb"] = meter.peak_bytes / 1e9
    figures["minutes"] = (time.monotonic() - started) / 60
    (home / "demo.json").write_text(json.dumps(figures, indent=2, default=str) + "\n")
    show(figures)
    return 0 if figures["renewal"]["state"] == "PROMOTED" else 1


if __name__ == "__main__":
    sys.exit(main())
