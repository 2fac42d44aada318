"""The shapes that rows come in, each turned into an `Example`.

A conversation is checked strictly: known roles, no empty content, a system message only at its
start, something said before the assistant speaks, and the assistant's turn last. Two turns of one
role in a row are allowed here; a chat template that cannot render them refuses them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graft.core.errors import DataError
from graft.core.progress import QUIET, Progress
from graft.core.registry import nearest
from graft.data.readers import read_rows
from graft.data.records import Example, Message

ROLES = ("system", "user", "assistant", "tool")

_LABELS = {"true": True, "1": True, "false": False, "0": False}
"""A CSV file has no other way to say it."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Row = dict[str, Any]


def load_examples(
    source: str,
    format: str,
    *,
    system: str | None = None,
    limit: int | None = None,
    progress: Progress = QUIET,
) -> list[Example]:
    """Reads and checks the rows of a data source.

    Args:
        source: A file or `hub:<id>[:<split>]`; see `read_rows`.
        format: One of the recipe's `data.format`; `auto` goes by the first row's keys.
        system: A system message for conversations that have none.
        limit: Read only the first so many rows.
        progress: Told which format was recognised.

    Raises:
        DataError: The source cannot be read, or a row does not fit the format; the row is named.
    """
    rows = read_rows(source, limit=limit)
    if format == "auto":
        format = detect_format(rows[0][1], rows[0][0])
        progress.note(f"{source}: rows are of format {format!r}")
    convert = _CONVERTERS[format]
    examples = []
    for place, row in rows:
        missing = [key for key in _KEYS[format] if row.get(key) is None]
        if missing:
            raise DataError(_describe_missing(place, row, format, missing))
        examples.append(convert(row, place, system))
    return examples


def detect_format(row: Row, place: str) -> str:
    """Recognises a row's format by its keys.

    Raises:
        DataError: No format has these keys.
    """
    for name, keys in _KEYS.items():
        is_unlabelled = name == "unpaired" and str(row.get("label")).lower() not in _LABELS
        if all(row.get(key) is not None for key in keys) and not is_unlabelled:
            return name
    raise DataError(
        f"{place}: no known format has the keys {', '.join(map(repr, row)) or '(none)'}; known: "
        + "; ".join(f"{name} ({', '.join(keys)})" for name, keys in _KEYS.items())
    )


def _describe_missing(place: str, row: Row, format: str, missing: list[str]) -> str:
    if empty := [key for key in missing if key in row]:
        return f"{place}: {', '.join(map(repr, empty))} is null; format {format!r} needs a value"
    text = (
        f"{place}: format {format!r} needs {', '.join(map(repr, missing))}, and the row has "
        f"{', '.join(map(repr, row)) or 'no keys'}.{nearest(missing[0], list(row))}"
    )
    others = [n for n, keys in _KEYS.items() if all(row.get(key) is not None for key in keys)]
    return text + (f" It looks like {others[0]!r}: one file holds one format" if others else "")


def _from_messages(row: Row, place: str, system: str | None) -> Example:
    return _conversation(_turns(row["messages"], f"{place}: messages"), place, system)


def _from_alpaca(row: Row, place: str, system: str | None) -> Example:
    turns: list[Message] = []
    if row.get("system"):
        turns.append(_turn("system", row["system"], f"{place}: system"))
    for number, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{place}: history[{number}] is no pair of question and answer")
        turns.append(_turn("user", pair[0], f"{place}: history[{number}][0]"))
        turns.append(_turn("assistant", pair[1], f"{place}: history[{number}][1]"))
    instruction = _text(row["instruction"], f"{place}: instruction")
    if row.get("input"):
        instruction += "\n" + _text(row["input"], f"{place}: input")
    turns.append(Message(role="user", content=instruction))
    turns.append(_turn("assistant", row["output"], f"{place}: output"))
    return _conversation(turns, place, system)


def _from_sharegpt(row: Row, place: str, system: str | None) -> Example:
    raw = row["conversations"]
    if not isinstance(raw, list):
        raise DataError(f"{place}: conversations is no list but {type(raw).__name__}")
    turns = []
    for number, turn in enumerate(raw):
        at = f"{place}: conversations[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(
                f"{at} needs the keys 'from' and 'value', as in {{'from': 'human', ...}}"
            )
        name = str(turn["from"])
        if name not in _SHAREGPT_ROLES:
            raise DataError(
                f"{at}: unknown speaker {name!r}.{nearest(name, list(_SHAREGPT_ROLES))} "
                f"Known: {', '.join(_SHAREGPT_ROLES)}"
            )
        turns.append(_turn(_SHAREGPT_ROLES[name], turn["value"], at))
    if row.get("system") and turns and turns[0].role != "system":
        turns.insert(0, _turn("system", row["system"], f"{place}: system"))
    return _conversation(turns, place, system)


def _from_prompt_completion(row: Row, place: str, system: str | None) -> Example:
    prompt = _side(row["prompt"], "user", f"{place}: prompt")
    completion = _side(row["completion"], "assistant", f"{place}: completion")
    return _conversation([*prompt, *completion], place, system)


def _from_preference(row: Row, place: str, system: str | None) -> Example:
    chosen = _side(row["chosen"], "assistant", f"{place}: chosen")
    rejected = _side(row["rejected"], "assistant", f"{place}: rejected")
    prompt = chosen[:-1]
    if rejected[:-1] != prompt:
        raise DataError(
            f"{place}: the prompts of chosen and rejected differ; a pair is two answers to one "
            "prompt, so only the last turns may"
        )
    if row.get("prompt") is not None:
        given = _side(row["prompt"], "user", f"{place}: prompt")
        if prompt and prompt[-len(given) :] != given:
            raise DataError(
                f"{place}: prompt is not what chosen and rejected reply to; leave it out, or leave "
                "one assistant turn in each of them"
            )
        prompt = prompt or given
    if not prompt:
        raise DataError(
            f"{place}: without 'prompt', chosen and rejected must be conversations that differ in "
            "their last turn only"
        )
    answer = _require_answer(chosen[-1], f"{place}: chosen")
    other = _require_answer(rejected[-1], f"{place}: rejected")
    if answer == other:
        raise DataError(f"{place}: chosen and rejected are equal; nothing can be preferred")
    asked = _conversation([*prompt, chosen[-1]], place, system).messages[:-1]
    return Example(source=place, prompt=asked, chosen=answer, rejected=other)


def _from_unpaired(row: Row, place: str, system: str | None) -> Example:
    prompt = _side(row["prompt"], "user", f"{place}: prompt")
    completion = _side(row["completion"], "assistant", f"{place}: completion")
    if len(completion) != 1:
        raise DataError(f"{place}: completion must be one assistant turn")
    answer = _require_answer(completion[0], f"{place}: completion")
    label = str(row["label"]).lower()
    if label not in _LABELS:
        raise DataError(
            f"{place}: label must say whether the completion is wanted, true or false, not "
            f"{row['label']!r}"
        )
    asked = _conversation([*prompt, *completion], place, system).messages[:-1]
    return Example(source=place, prompt=asked, answer=answer, is_wanted=_LABELS[label])


def _require_answer(turn: Message, place: str) -> str:
    if turn.role != "assistant":
        raise DataError(f"{place} must end with an assistant turn, not the {turn.role}'s")
    return turn.content


def _from_prompts(row: Row, place: str, system: str | None) -> Example:
    prompt = _side(row["prompt"], "user", f"{place}: prompt")
    if prompt[-1].role == "assistant":
        raise DataError(
            f"{place}: prompt ends with the assistant's turn, so nothing is asked; end it with the "
            "user's, or name the answer 'completion'"
        )
    answered = [*prompt, Message(role="assistant", content="-")]
    return Example(source=place, prompt=_conversation(answered, place, system).messages[:-1])


def _from_text(row: Row, place: str, system: str | None) -> Example:
    return Example(source=place, text=_text(row["text"], f"{place}: text"))


_KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "alpaca": ("instruction", "output"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "prompts": ("prompt",),
}
"""What each format's rows must have; other keys are left alone. In the order of recognition."""

_CONVERTERS: dict[str, Callable[[Row, str, str | None], Example]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "preference": _from_preference,
    "alpaca": _from_alpaca,
    "unpaired": _from_unpaired,
    "prompt_completion": _from_prompt_completion,
    "prompts": _from_prompts,
    "text": _from_text,
}


def _side(value: Any, role: str, place: str) -> list[Message]:
    if isinstance(value, str):
        return [_turn(role, value, place)]
    if not isinstance(value, list):
        raise DataError(f"{place} must be text or a list of turns, not {_kind(value)}")
    return _turns(value, place)


def _turns(raw: Any, place: str) -> list[Message]:
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{place} must be a list of at least one turn, not {_kind(raw)}")
    turns = []
    for number, turn in enumerate(raw):
        at = f"{place}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{at} must be an object with 'role' and 'content', not {_kind(turn)}")
        if turn.get("tool_calls"):
            raise DataError(f"{at}: tool_calls are not supported; write the call as content")
        if turn.get("weight", 1) != 1:
            raise DataError(
                f"{at}: weight {turn['weight']!r} is not supported, and the turn would be learned "
                "from; leave it out of the row, or end the row before it"
            )
        if "role" not in turn:
            raise DataError(f"{at} has no 'role'.{nearest('role', list(turn))}")
        turns.append(_turn(turn["role"], turn.get("content"), at))
    return turns


def _turn(role: Any, content: Any, place: str) -> Message:
    if role not in ROLES:
        raise DataError(
            f"{place}: unknown role {role!r}.{nearest(str(role), list(ROLES))} Known: "
            f"{', '.join(ROLES)}"
        )
    return Message(role=role, content=_text(content, place))


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: the content must be text, not {_kind(value)}")
    if not value.strip():
        raise DataError(f"{place}: the content is empty")
    if "\x00" in value:
        raise DataError(f"{place}: the content holds a null character; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the content holds half a surrogate pair ({value[error.start]!a}), which is "
            "no character; remove it"
        ) from error
    return value


def _kind(value: Any) -> str:
    return (
        "null"
        if value is None
        else type(value).__name__
        if value
        else f"an empty {type(value).__name__}"
    )


def _conversation(turns: list[Message], place: str, system: str | None) -> Example:
    if system is not None and turns[:1] and turns[0].role != "system":
        turns = [Message(role="system", content=system), *turns]
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise DataError(
            f"{place}: the row has no assistant turn, so there is nothing to learn from"
        )
    if "system" in roles[1:]:
        raise DataError(f"{place}: a system message must stand first")
    if not {"user", "tool"} & set(roles[: roles.index("assistant")]):
        raise DataError(
            f"{place}: the assistant speaks before anybody else; start with a user's turn"
        )
    if roles[-1] != "assistant":
        raise DataError(
            f"{place}: the last turn is the {roles[-1]}'s; nothing after the last assistant turn "
            "can be learned, so end the row there"
        )
    return Example(source=place, messages=tuple(turns))
