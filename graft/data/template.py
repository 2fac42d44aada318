"""Conversations to tokens with the model's own chat template, and which of them are learned.

A row is cut where the assistant begins to speak and where its turn ends; each piece is tokenized by
itself. So the tokens that the model is prompted with are exactly the start of the row it was
trained on, whatever the tokenizer would merge across the cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import DataError, ModelError
from graft.data.records import Message, TokenRow
from graft.models.tokenizer import template_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Message | dict[str, Any]

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Unicode non-characters: stand around what must not be read as a control token while rendering."""

_PROBE = (
    Message(role="user", content="A first question?"),
    Message(role="assistant", content="{answer: 1}"),
)


class _Piece(NamedTuple):
    """A part of the rendered text."""

    text: str
    is_supervised: bool


class ChatTemplate:
    """A tokenizer's chat template, proved to be usable for training.

    Text that spells a control token (`<|im_end|>` in a user's message) is tokenized as plain text:
    it cannot end a turn or begin one.

    Raises:
        ModelError: The tokenizer has no chat template, or one that ends no turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an "
                "instruct "
                "model, or add a chat_template.jinja to the model's folder"
            )
        self._specials = self._control_texts()
        spelled = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self.context_tokens: int = tokenizer.model_max_length
        """Tokens that the model can see at once."""
        self.digest = template_digest(tokenizer)
        """Names vocabulary and template; equal digests give equal tokens."""
        self.stop_ids: frozenset[int] = frozenset(self._find_stop_ids())
        """Tokens that end the assistant's turn."""

    def tokens(self, messages: Sequence[Turn], *, source: str = "conversation") -> TokenRow:
        """Tokenizes a conversation; the assistant's turns, with their end tokens, are supervised.

        What stands after the last end of turn (a line break, in ChatML) is left out.

        Raises:
            DataError: No assistant turn, or the template cannot be cut at the turns.
        """
        pieces = self._pieces(_plain(messages), source)
        ids: list[int] = []
        mask: list[bool] = []
        for piece in pieces:
            new = self._encode(piece.text, is_first=not ids)
            ids += new
            mask += [piece.is_supervised] * len(new)
        return TokenRow(ids, mask, source)

    def prompt_ids(self, messages: Sequence[Turn], *, source: str = "conversation") -> list[int]:
        """Tokenizes a conversation up to where the assistant speaks next.

        Equal to the start of `tokens(messages + [answer])`, token by token.

        Raises:
            DataError: The template refuses the conversation.
        """
        plain = _plain(messages)
        hidden = [self._hide(message, source) for message in plain]
        ids: list[int] = []
        text = ""
        for piece in self._turn_pieces(hidden, source):
            ids += self._encode(piece.text, is_first=not ids)
            text += piece.text
        prompt = self._render(hidden, source, ask=True)
        _require_prefix(text, prompt, source)
        return ids + self._encode(prompt[len(text) :], is_first=not ids)

    def answers(
        self, prompt: Sequence[Turn], answers: Sequence[str], *, source: str = "conversation"
    ) -> TokenRow:
        """Tokenizes answers to one prompt as the branches of one row.

        Every answer is supervised with its end token; behind the prompt it is the same tokens as
        it is in a conversation of its own.

        Raises:
            DataError: The template cannot be cut at the turns.
        """
        ids = self.prompt_ids(prompt, source=source)
        num_prompt = len(ids)
        branch = [0] * num_prompt
        for number, answer in enumerate(answers, 1):
            turns = [*prompt, Message(role="assistant", content=answer)]
            own = self.tokens(turns, source=source).input_ids[num_prompt:]
            ids = ids + own
            branch += [number] * len(own)
        return TokenRow(ids, [of > 0 for of in branch], source, branch)

    def _pieces(self, messages: list[dict[str, str]], source: str) -> list[_Piece]:
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{source}: the conversation has no assistant turn to learn from")
        return self._turn_pieces([self._hide(message, source) for message in messages], source)

    def _turn_pieces(self, messages: list[dict[str, str]], source: str) -> list[_Piece]:
        """Cuts the rendered text at each assistant turn; ends with the last turn's end token."""
        pieces: list[_Piece] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], source, ask=True)
            upto = self._render(messages[: index + 1], source)
            _require_prefix(done, prompt, source)
            _require_prefix(prompt, upto, source)
            answer = self._until_end_of_turn(upto[len(prompt) :], message["content"], source)
            pieces += [_Piece(prompt[len(done) :], False), _Piece(answer, True)]
            done = prompt + answer
        return pieces

    def _until_end_of_turn(self, text: str, content: str, source: str) -> str:
        """Cuts a rendered turn after its first control token that follows the content."""
        start = text.find(content.strip())
        end = self._special_pattern.search(text, max(start, 0) + len(content.strip()))
        if start < 0 or end is None:
            what = "changes the assistant's words" if start < 0 else "ends no assistant turn"
            raise DataError(
                f"{source}: the model's chat template {what}, so what is to be learned cannot "
                "be told; "
                "use another template (chat_template.jinja in the model's folder)"
            )
        return text[: end.end()]

    def _render(self, messages: list[dict[str, str]], source: str, *, ask: bool = False) -> str:
        if not messages:
            return self._render_opening(source)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program: it raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{source}: the model's chat template refuses this conversation ({roles}): {error}"
            ) from error
        return str(text)

    def _render_opening(self, source: str) -> str:
        raise DataError(
            f"{source}: the conversation starts with the assistant; a user's turn is due"
        )

    def _hide(self, message: dict[str, str], source: str) -> dict[str, str]:
        """Marks control tokens spelled in a message, so that they survive rendering as text."""
        content = message["content"]
        if _OPEN in content or _CLOSE in content:
            raise DataError(
                f"{source}: the text holds the Unicode non-character U+FDD0 or U+FDD1; remove it"
            )
        if not self._special_pattern.search(content):
            return message
        hidden = self._special_pattern.sub(
            lambda match: f"{_OPEN}{self._specials[match.group()]}{_CLOSE}", content
        )
        return {**message, "content": hidden}

    def _encode(self, text: str, *, is_first: bool) -> list[int]:
        """Tokenizes a piece; what was hidden comes back as plain text."""
        ids: list[int] = []
        parts = re.split(f"{_OPEN}(\\d+){_CLOSE}", text)
        for number, part in enumerate(parts):
            if number % 2:
                ids += self._encode_plain(self._texts[int(part)])
            elif part:
                ids += self._encode_part(part, is_first=is_first and not ids)
        return ids

    def _encode_part(self, text: str, *, is_first: bool) -> list[int]:
        if is_first:
            return self._ids(text)
        # Some tokenizers put a space before the start of a text; behind another token they do not.
        ids = self._ids(self._anchor + text)
        return ids[len(self._anchor_ids) :]

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        if self._control_ids & set(ids):
            raise DataError(
                f"the text spells the control token {text!r}, which this tokenizer cannot read "
                "as plain "
                "text; remove it"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _control_texts(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        controls = {index: str(token) for index, token in added.items() if token.special}
        self._control_ids = frozenset(controls)
        self._texts = sorted(set(controls.values()))
        self._anchor = self.tokenizer.eos_token or (self._texts[0] if self._texts else "")
        self._anchor_ids = self._ids(self._anchor)
        return {text: number for number, text in enumerate(self._texts)}

    def _find_stop_ids(self) -> list[int]:
        try:
            row = self.tokens(_PROBE, source="probe")
        except DataError as error:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot be trained on: "
                f"{error}"
            ) from error
        eos = self.tokenizer.eos_token_id
        return [row.input_ids[-1]] + ([eos] if isinstance(eos, int) else [])


def _plain(messages: Sequence[Turn]) -> list[dict[str, str]]:
    return [
        {"role": turn.role, "content": turn.content}
        if isinstance(turn, Message)
        else {"role": str(turn["role"]), "content": str(turn["content"])}
        for turn in messages
    ]


def _require_prefix(start: str, whole: str, source: str) -> None:
    if not whole.startswith(start):
        raise DataError(
            f"{source}: the model's chat template rewrites earlier turns when later ones "
            "follow, so the "
            "row has no one prompt and answer; give single-turn rows, or use another template"
        )
