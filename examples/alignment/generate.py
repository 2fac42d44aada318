"""Writes preference pairs of smart-home commands: the right action, and a plausible wrong one.

    python examples/alignment/generate.py            # writes examples/alignment/data/

People correct themselves: "open the attic blinds, no, heat the office to 21 degrees". The right
action is of the command that stands, the wrong one of the command that was taken back, which has
another place, device, value or action; or the command is a plain one, and the wrong action lacks a
field. These five kinds take turns. Commands and actions are those of `../smart_home/generate.py`,
of the part that its held-out rows never use. `sft.jsonl` has plain commands with their actions, for
the start; `train.jsonl` has pairs to learn from, `eval.jsonl` held-out pairs. No command of
`eval.jsonl`, standing or taken back, is in the other two in any manner.
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
from pathlib import Path
from typing import Any, NamedTuple

SMART_HOME = Path(__file__).resolve().parents[1] / "smart_home" / "generate.py"
SMART_HOME_SEED = 0
"""Of its committed data, which tells what is held out there."""

NUM_DEMONSTRATIONS = 320
NUM_PAIRS = {"train": 800, "eval": 320}

CORRECTIONS = (
    "{wrong}, no, {right}",
    "{wrong}, or rather {right}",
    "{right}, do not {wrong}",
    "{right} but never {wrong}",
)
"""The command that stands comes first as often as last, so its place alone does not tell."""

TAKEN_BACK = {
    "wrong_place": ("place", ("device", "action", "value")),
    "wrong_device": ("device", ("place",)),
    "wrong_value": ("value", ("device", "place", "action")),
    "wrong_action": ("action", ("device", "place")),
}
"""Kind → the field in which both commands differ, and those in which they are equal."""
MISSING_FIELD = "missing_field"
KINDS = (*TAKEN_BACK, MISSING_FIELD)


class Command(NamedTuple):
    """Something to say, and the action that it asks for."""

    text: str
    action: dict[str, int | str]


class Pair(NamedTuple):
    """A sentence with two answers."""

    sentence: str
    chosen: dict[str, int | str]
    rejected: dict[str, int | str]
    kind: str


class Generator:
    """Draws sentences that are all different.

    Args:
        seed: Same seed, same data.
    """

    def __init__(self, seed: int = 0) -> None:
        self._home = runpy.run_path(str(SMART_HOME))
        self._draw = random.Random(seed)
        self._taken: set[str] = set()

    def parts(self) -> dict[str, list[str]]:
        """Makes the lines of all files, by the file's name."""
        train, held_out = self.split()
        return {
            "sft.jsonl": [self._demonstration(train) for _ in range(NUM_DEMONSTRATIONS)],
            "train.jsonl": self._pairs(train, NUM_PAIRS["train"]),
            "eval.jsonl": self._pairs(held_out, NUM_PAIRS["eval"]),
        }

    def split(self) -> tuple[list[list[Command]], list[list[Command]]]:
        """Divides the commands that smart-home trains on, intent by intent: trained, held out."""
        as_there = random.Random(SMART_HOME_SEED)
        train, held_out = [], []
        for intents in self._home["FAMILIES"].values():
            for cores in self._home["split_cores"](intents, as_there)[0]:
                commands = [Command(text, json.loads(answer)) for text, answer in cores]
                self._draw.shuffle(commands)
                cut = max(1, round(self._home["EVAL_SHARE"] * len(commands)))
                held_out.append(commands[:cut])
                train.append(commands[cut:])
        return train, held_out

    def _demonstration(self, pools: list[list[Command]]) -> str:
        while True:
            command = self._draw.choice(self._draw.choice(pools))
            if sentence := self._say(command.text):
                answer = {"role": "assistant", "content": _dumps(command.action)}
                return _dumps({"messages": [*self._prompt(sentence), answer]})

    def _pairs(self, pools: list[list[Command]], num_pairs: int) -> list[str]:
        pairs: list[Pair] = []
        while len(pairs) < num_pairs:
            kind = KINDS[len(pairs) % len(KINDS)]
            command = self._draw.choice(self._draw.choice(pools))
            pair = self._missing(command) if kind == MISSING_FIELD else None
            if kind in TAKEN_BACK:
                pair = self._corrected(command, kind, pools)
            if pair is not None:
                pairs.append(pair)
        self._draw.shuffle(pairs)
        return [
            _dumps(
                {
                    "prompt": self._prompt(pair.sentence),
                    "chosen": _dumps(pair.chosen),
                    "rejected": _dumps(pair.rejected),
                    "kind": pair.kind,
                }
            )
            for pair in pairs
        ]

    def _missing(self, command: Command) -> Pair | None:
        left_out = self._draw.choice(list(command.action))
        rejected = {key: value for key, value in command.action.items() if key != left_out}
        sentence = self._say(command.text)
        return Pair(sentence, command.action, rejected, MISSING_FIELD) if sentence else None

    def _corrected(self, right: Command, kind: str, pools: list[list[Command]]) -> Pair | None:
        """Takes back a command that differs in one field; None where there is none."""
        other, equal = TAKEN_BACK[kind]
        if other not in right.action:
            return None
        candidates = [
            command
            for pool in pools
            for command in pool
            if command.action.get(other, right.action[other]) != right.action[other]
            and all(command.action.get(key) == right.action.get(key) for key in equal)
        ]
        if not candidates:
            return None
        wrong = self._draw.choice(candidates)
        form = self._draw.choice(CORRECTIONS)
        sentence = self._say(form.format(right=right.text, wrong=wrong.text))
        return Pair(sentence, right.action, wrong.action, kind) if sentence else None

    def _say(self, text: str) -> str | None:
        """Puts a command into a manner; None where that sentence stands already."""
        sentence: str = self._home["say"](text, self._draw)
        if sentence in self._taken:
            return None
        self._taken.add(sentence)
        return sentence

    def _prompt(self, sentence: str) -> list[dict[str, str]]:
        system = {"role": "system", "content": self._home["SYSTEM"]}
        return [system, {"role": "user", "content": sentence}]


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description="Write the preference pairs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, lines in Generator(arguments.seed).parts().items():
        (arguments.out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
