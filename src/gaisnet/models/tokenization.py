"""Text to token ids and back: the only module that calls a tokenizer, so that training, scores and answers agree.

A text opens as the tokenizer itself opens it, with a beginning-of-sequence token if it writes one; a prompt is never
closed. The spelling of a special token in a text is ordinary text: only a tokenizer and its chat template write special
tokens.

**Where a completion begins.** A completion's tokens are those of prompt and completion joined, without the prompt's. If
a token of the joined text lies across the border, there are no such tokens. Then the prompt is encoded by itself, as it
is served, and the completion as text that continues it.
"""

import copy
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gaisnet.errors import SessionRefused
from gaisnet.models.chat_template import rendered_chat

BROKEN = "\ufffd"
"""Stands in decoded text for bytes that are no character, and for the first bytes of one."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a tokenizer with byte fallback
_ANCHORS = ("a", ".", "\n")  # precede a text that does not begin one; none of them merges with everything


class _Facts:
    """Facts about a tokenizer, computed once; later changes to it are not seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self.silent = frozenset({token for token, each in added if each.special} | set(tokenizer.all_special_ids))
        """Special tokens, which decode to no text."""
        self.special = self.silent - {tokenizer.unk_token_id}
        """Special tokens that no text may become; the one for unknown characters stands for text."""
        whole, text = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a")
        starts = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
        at = next(starts, 0)
        self.opening, self.closing = tuple(whole[:at]), tuple(whole[at + len(text) :])
        """Tokens that the tokenizer adds around a text."""
        self._tokenizer = copy.copy(tokenizer)  # a copy: a value of a weak dictionary must not hold its key

    @cached_property
    def literal(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer without special tokens; switching the shared one would confuse other threads."""
        literal = copy.deepcopy(self._tokenizer)
        literal.split_special_tokens = True
        return literal


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, _Facts] = WeakKeyDictionary()


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    known = _FACTS.get(tokenizer)
    if known is None:
        known = _FACTS[tokenizer] = _Facts(tokenizer)
    return known


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return cast(list[int], tokenizer.encode(text, add_special_tokens=special, verbose=False))


# -- text to ids -------------------------------------------------------------------------------------------------------


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the token ids of a text alone, without additions and without special tokens."""
    ids, silent = _ids(tokenizer, text), _facts(tokenizer).silent
    return tuple(ids if silent.isdisjoint(ids) else _literal_ids(tokenizer, text))


def _literal_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text that may spell special tokens; the unknown token may stand for such a spelling."""
    facts = _facts(tokenizer)
    ids = _ids(facts.literal, text)
    # A vocabulary with a special token among its ordinary pieces finds it in plain text all the same.
    return [piece for token in ids for piece in (_letters(facts, token) if token in facts.special else [token])]


def _letters(facts: _Facts, token: int) -> list[int]:
    """Spell a special token letter by letter, in ordinary tokens."""
    spelling = cast(str, facts.literal.convert_ids_to_tokens(token))
    model = cast(Any, facts.literal).backend_tokenizer.model
    return [each.id for letter in spelling for each in model.tokenize(letter) if each.id not in facts.special]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer writes before a text: often one, often none."""
    return _facts(tokenizer).opening


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens from which a model generates without a prompt; at least one."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return opening_ids(tokenizer) or (int(start),)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Encode a prompt: opened as the tokenizer opens a text, and not closed."""
    return (*opening_ids(tokenizer), *text_ids(tokenizer, text))


def continuing_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Encode a text that continues another: without the space that some tokenizers put before a text."""
    for anchor in _ANCHORS:
        before, whole = text_ids(tokenizer, anchor), text_ids(tokenizer, anchor + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return text_ids(tokenizer, text)


@dataclass(frozen=True)
class Closed:
    """Token ids of a text to classify, opened and closed as the tokenizer does it."""

    opening: tuple[int, ...]
    text: tuple[int, ...]
    closing: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.opening) + len(self.text) + len(self.closing)

    def shortened(self, most: int) -> list[int]:
        """Return at most ``longest`` tokens; the text loses its end."""
        room = max(most - len(self.opening) - len(self.closing), 0)
        return [*self.opening, *self.text[:room], *self.closing]


def closed_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Closed:
    """Encode a text to classify."""
    facts = _facts(tokenizer)
    return Closed(facts.opening, text_ids(tokenizer, text), facts.closing)


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its completion."""

    opening: tuple[int, ...]  # tokens that the tokenizer writes before a text
    prompt: tuple[int, ...]  # the prompt's text
    completion: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.opening) + len(self.prompt) + len(self.completion)

    def shortened(self, most: int) -> tuple[int, ...]:
        """Return at most ``longest`` tokens: the opening stays, and the prompt loses its beginning.

        Raises ``ValueError`` if there is no room for a single token of the prompt.
        """
        room = most - len(self.opening) - len(self.completion)
        if room < 1:
            raise ValueError(f"no room for a prompt in {most} tokens")
        return (*self.opening, *self.prompt[-room:], *self.completion)


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Pair:
    """Encode a prompt and the completion that follows it."""
    before, joined = text_ids(tokenizer, prompt), text_ids(tokenizer, prompt + completion)
    fits = joined[: len(before)] == before
    after = joined[len(before) :] if fits else continuing_ids(tokenizer, completion)
    return Pair(opening_ids(tokenizer), before, after)


def window_ids(tokenizer: PreTrainedTokenizerBase, text: str, num: int, length: int) -> list[list[int]]:
    """Cut the beginning of a text into windows of one length, each opened like a text.

    Fewer than ``num`` if it is short.
    """
    opening = opening_ids(tokenizer)
    ids, step = text_ids(tokenizer, text), length - len(opening)
    return [[*opening, *ids[at : at + step]] for at in range(0, min(num * step, len(ids) - step + 1), step)]


# -- chats -------------------------------------------------------------------------------------------------------------


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Encode a chat with the tokenizer's own template, up to where the assistant's next message begins.

    Special tokens are those that the template writes. A message that spells one is encoded around the spelling, which
    becomes ordinary tokens; any other chat is encoded as transformers does it.

    Args:
        tokenizer: The FM's.
        messages: ``role`` and ``content`` of each.

    Raises:
        SessionRefused: See ``models.chat_template.rendered_chat``; or a message becomes a special token in a way that
            cannot be told from the template's own.
        ServiceFull: See there.
    """
    marks = _Marks.of(_controls(tokenizer, tokenizer.get_chat_template() if tokenizer.chat_template else ""))
    text = rendered_chat(tokenizer, [marks.put_into(each) for each in messages])
    ids: list[int] = []
    for number, piece in enumerate(marks.split(text)):
        if number % 2:
            ids += _spelled_ids(tokenizer, piece)
        elif piece:
            ids += _template_ids(tokenizer, piece, marks, first=not number)
    return tuple(ids)


def _controls(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Return the tokens that structure a chat: special ones, and added ones that the template writes."""
    added = tokenizer.added_tokens_decoder.values()
    written = {each.content for each in added if each.content in template and not each.content.isspace()}
    return sorted({*(each.content for each in added if each.special), *written}, key=len, reverse=True)


@dataclass(frozen=True)
class _Marks:
    """Unguessable marks around spellings of control tokens in messages."""

    controls: re.Pattern[str]
    start: str
    end: str

    @classmethod
    def of(cls, controls: Sequence[str]) -> "_Marks":
        nonce = secrets.randbelow(10**18)  # digits survive a template that changes the case of messages
        pattern = "|".join(map(re.escape, controls)) or "(?!)"
        return cls(re.compile(pattern), f"\ue000{nonce}\ue001", f"\ue002{nonce}\ue001")

    def put_into(self, message: Mapping[str, str]) -> dict[str, str]:
        """Mark a message, except its role, which templates compare with words of their own."""
        return {key: text if key == "role" else self.put(text) for key, text in message.items()}

    def put(self, text: str) -> str:
        return self.controls.sub(lambda found: f"{self.start}{found[0]}{self.end}", text)

    def split(self, text: str) -> list[str]:
        """Split into text and marked spellings in turn. A mark whose partner the template cut off still splits."""
        start, end = re.escape(self.start), re.escape(self.end)
        pieces = re.split(f"{start}({self.controls.pattern}){end}|{start}|{end}", text)
        return [piece or "" for piece in pieces]


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: _Marks, first: bool) -> list[int]:
    """Encode a part of a rendered chat, in which the template's special tokens count."""
    ids, special = _ids(tokenizer, text), _facts(tokenizer).special
    if sum(token in special for token in ids) > len(marks.controls.findall(text)):
        found = "a message holds letters that the tokenizer makes a special token of"
        raise SessionRefused("a chat", found, "write it otherwise")
    if first:
        return ids
    for anchor in _ANCHORS:
        before, whole = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return ids


def _spelled_ids(tokenizer: PreTrainedTokenizerBase, spelling: str) -> list[int]:
    """Encode the spelling of a control token, special or added, in ordinary tokens."""
    added = set(tokenizer.added_tokens_decoder)
    ids = continuing_ids(tokenizer, spelling)
    if added.isdisjoint(ids):
        return list(ids)
    return [token for letter in spelling for token in continuing_ids(tokenizer, letter)]


# -- the end of an answer, and back to text ----------------------------------------------------------------------------


def ending_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's configuration.

    ``models.foundation`` adds those of the generation configuration to the latter.
    """
    return frozenset(token for token in (tokenizer.eos_token_id, *ends_of(config)) if token is not None)


def ends_of(settings: Any) -> tuple[int, ...]:
    """Return the end tokens in a model's or generation's configuration: one, several or none."""
    found = getattr(settings, "eos_token_id", None)
    return tuple(map(int, found if isinstance(found, list | tuple) else [] if found is None else [found]))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode token ids exactly: special tokens give no text, and no space is cleaned up."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class GrowingText:
    """The text of an answer whose tokens arrive one by one; emitted text never changes.

    The emitted text is ``decoded`` of all tokens, as far as later tokens cannot change it. A
    tokenizer with byte fallback decodes a run of bytes together: one wrong byte makes all of it wrong. So nothing of a
    run is certain before it ends. Only tokens since the last place but one at which all was certain are decoded: the
    tokens before it decide whether a space is dropped, as at the beginning of a text.

    Args:
        tokenizer: The tokenizer of the model that writes.
        continues: Whether the text continues another, and so keeps a space at its beginning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._silent = _facts(tokenizer).silent
        self._ids = list(text_ids(tokenizer, _ANCHORS[0])) if continues else []
        self._given = len(decoded(tokenizer, self._ids))  # characters of theirs that were emitted
        self._certain = len(self._ids)  # tokens up to the last place where all was certain

    def add_token(self, token: int) -> str:
        """Add the next token; return the text that has become certain."""
        spelling = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._silent or not isinstance(spelling, str):
            return ""
        self._ids.append(token)
        if _BYTE.fullmatch(spelling):
            return ""
        text = decoded(self._tokenizer, self._ids)
        certain = text.removesuffix(BROKEN)  # bytes that later ones may complete to a character
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if certain == text:
            self._forget()
        return new

    def rest(self) -> str:
        """Return the rest of the text, when no further token comes."""
        return decoded(self._tokenizer, self._ids)[self._given :]

    def _forget(self) -> None:
        if self._certain:
            del self._ids[: self._certain]
            self._given = len(decoded(self._tokenizer, self._ids))
        self._certain = len(self._ids)
