"""From a model's name and a prompt to text: which bodies write, and what came of it.

=============== ============================================================================================
``foundation``  the FM as it was loaded
``merged``      the FM with the one adapter that holds all domains
``<domain>``    the DM at that domain's edge
``auto``        the DM of the device's own domain, and the FM where it is not sure: as ``merged`` or with that
                domain's adapter, whichever its routing says
=============== ============================================================================================
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from gaisnet.errors import GaisnetError, SessionRefused, UnknownModel
from gaisnet.models.tokenization import ending_ids
from gaisnet.serving.engine.sessions import BodySession
from gaisnet.serving.generation.bodies import Bodies, Place, Target
from gaisnet.serving.generation.decoding import DeviceParts, Tokens, check_prompt, write
from gaisnet.serving.generation.routing import Routing, Trace, write_routed
from gaisnet.serving.generation.sampling import Sampling
from gaisnet.serving.generation.speculation import DraftLength, Tally, write_speculatively
from gaisnet.serving.generation.text import text_of

AUTO, FOUNDATION, MERGED = "auto", "foundation", "merged"


@dataclass(frozen=True)
class Domain:
    """A domain that is served, under the names that the bodies' services know its adapters by."""

    routing: Routing  # to the FM
    adapters: tuple[str, ...] = ("relay", "domain")  # on the DM


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller wants written."""

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()  # strings that end the answer, and are no part of it
    domain: str | None = None  # for ``auto``: another than the device's own
    speculate: bool | None = None  # the DM drafts what the FM writes; None as the device is set
    continues: bool = False  # the answer goes on from the prompt's text, and may begin with a space


@dataclass
class Course:
    """How an answer went, or goes."""

    body: Place
    domain: str
    trace: Trace | None = None  # of a routed answer
    tally: Tally | None = None  # of a speculative one
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # written so far, the one that ends the answer included
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def now(self) -> Place:
        """Which body writes now."""
        return self.body if self.trace is None else self.trace.body

    @property
    def escalated_at(self) -> int | None:
        """Number of the first token that the FM wrote in the DM's place; all later ones are its too."""
        return None if self.trace is None else self.trace.escalated_at

    @property
    def cloud_refused(self) -> bool:
        """The DM was not sure and had to go on."""
        return self.trace is not None and self.trace.refusal is not None


def _nobody() -> None:
    """Nobody counts tokens."""


@dataclass
class Answer:
    """An answer that is being written: iterate over its text once. ``close`` it from any thread to break off."""

    course: Course
    _ask: GenerationRequest
    _tokenizer: PreTrainedTokenizerBase
    _tokens: Tokens
    _sessions: Sequence[BodySession]
    _on_token: Callable[[], None] = _nobody
    _closed: bool = field(default=False)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come; none after ``close``. Raises a ``GaisnetError`` where a body fails."""
        try:
            for piece in text_of(self._counted(), self._tokenizer, self._ask.stop, self._ask.continues):
                if self._closed:
                    return
                yield piece
        except GaisnetError:
            if not self._closed:
                raise
        finally:
            self.course.finish_reason = self.course.finish_reason or "stop"  # a stop string
            self.close()

    def close(self) -> None:
        """Free the sessions at once, also while a body works for them."""
        self._closed = True
        for session in self._sessions:
            with suppress(GaisnetError):  # a body that is out of reach frees it by itself
                session.close()

    def _counted(self) -> Iterator[int]:
        course, token = self.course, -1
        try:
            for token in self._tokens:
                course.num_tokens += 1
                self._on_token()
                yield token
                if self._closed:
                    return
            course.finish_reason = "stop" if token in self._ask.sampling.stop_ids else "length"
        finally:
            self._tokens.close()


class Answering:
    """Writes answers, any number at once, each in a thread of its caller.

    Args:
        parts: The device's.
        tokenizer: The FM's.
        bodies: Where bodies are.
        domains: What is served, by name.
        home: The device's own domain: that of ``auto``.
        speculate: Whether the DM drafts what the FM writes, unless a request says.
    """

    def __init__(
        self,
        parts: DeviceParts,
        tokenizer: PreTrainedTokenizerBase,
        bodies: Bodies,
        domains: Mapping[str, Domain],
        home: str,
        speculate: bool = False,
    ) -> None:
        self._parts = parts
        self.tokenizer = tokenizer
        self._bodies = bodies
        self._domains = dict(domains)
        self._home = home
        self._speculate = speculate
        self._ends = ending_ids(tokenizer, parts.head.stack.config)

    @property
    def models(self) -> tuple[str, ...]:
        """Names that a request may give."""
        return AUTO, FOUNDATION, MERGED, *self._domains

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._parts.context

    def route(self, name: str, routing: Routing) -> None:
        """From now on ``auto`` goes this way in a domain; answers under way go on as they began."""
        self._domains[name] = replace(self._domains[name], routing=routing)

    def check_model(self, name: str) -> None:
        """Raise ``UnknownModel`` unless it is served."""
        if name not in self.models:
            raise UnknownModel(name, self.models)

    def begin(self, ask: GenerationRequest, on_token: Callable[[], None] = _nobody) -> Answer:
        """Open what it takes; nothing is computed before somebody iterates. Close the answer if nobody will.

        Args:
            ask: What to write. Tokens that end an answer are added to its own.
            on_token: Called as each token is there.

        Raises:
            UnknownModel: Of the model, or of the domain.
            SessionRefused, ContextFull: The prompt cannot be answered.
            GaisnetError: What the bodies raise.
        """
        self.check_model(ask.model)
        name = self._domain_of(ask)
        sampling = replace(ask.sampling, stop_ids=ask.sampling.stop_ids | self._ends)
        ask = replace(ask, sampling=sampling)
        check_prompt(self._parts, ask.prompt, sampling)
        if self._speculates(ask, name):
            return self._speculative(ask, name, on_token)
        if ask.model == AUTO:
            return self._routed(ask, name, on_token)
        return self._plain(ask, name, on_token)

    def _domain_of(self, ask: GenerationRequest) -> str:
        """Whose DM, and whose edge on the way to the FM."""
        if ask.model in self._domains:
            if ask.domain not in (None, ask.model):
                found = f"the model is '{ask.model}'"
                raise SessionRefused(f"domain '{ask.domain}'", found, "name a domain with 'auto' only")
            return ask.model
        name = ask.domain or self._home
        if name not in self._domains:
            raise UnknownModel(name, self._domains)
        return name

    def _speculates(self, ask: GenerationRequest, name: str) -> bool:
        """Whether the FM writes and the DM may draft. Raises ``SessionRefused`` if only a request thinks so."""
        if ask.model in self._domains:
            possible, found = False, f"'{ask.model}' is the model that drafts"
        else:
            never = ask.model == AUTO and self._domains[name].routing.policy == "never"
            possible, found = not never, "this device asks the foundation model for nothing"
        if ask.speculate and not possible:
            raise SessionRefused("speculation", found, "leave it out, or ask for 'auto', 'foundation' or 'merged'")
        return possible and (self._speculate if ask.speculate is None else ask.speculate)

    def _target(self, ask: GenerationRequest, name: str) -> Target:
        """The body that an answer of this model is the answer of."""
        if ask.model in self._domains:
            return self._drafter(name)
        on_foundation = {FOUNDATION: (), MERGED: (MERGED,), AUTO: self._domains[name].routing.adapters}
        return Target("cloud", on_foundation[ask.model], name)

    def _drafter(self, name: str) -> Target:
        return Target("edge", self._domains[name].adapters, name)

    def _plain(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        target = self._target(ask, name)
        session = self._bodies.open(target, *self._span(ask))
        tokens = write(self._parts, session, ask.prompt, ask.sampling)
        return self._answer(Course(target.body, name), ask, tokens, [session], on_token)

    def _routed(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        session, trace = self._bodies.open_escalating(self._drafter(name), *self._span(ask)), Trace()
        routing = self._domains[name].routing
        tokens = write_routed(self._parts, session, ask.prompt, ask.sampling, routing, trace)
        return self._answer(Course("edge", name, trace=trace), ask, tokens, [session], on_token)

    def _speculative(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        checker = self._bodies.open(self._target(ask, name), *self._span(ask))
        try:
            drafter = self._bodies.open(self._drafter(name), *self._span(ask))
        except GaisnetError:
            checker.close()
            raise
        tally = Tally()
        tokens = write_speculatively(
            self._parts, drafter, checker, ask.prompt, ask.sampling, length=DraftLength(), tally=tally
        )
        return self._answer(Course("cloud", name, tally=tally), ask, tokens, [drafter, checker], on_token)

    def _span(self, ask: GenerationRequest) -> tuple[int, int, int]:
        """Layers of the body, and positions to hold memory for."""
        return self._parts.first, self._parts.stop, len(ask.prompt) + ask.sampling.max_tokens

    def _answer(
        self,
        course: Course,
        ask: GenerationRequest,
        tokens: Tokens,
        sessions: Sequence[BodySession],
        on_token: Callable[[], None],
    ) -> Answer:
        course.num_prompt_tokens = len(ask.prompt)
        return Answer(course, ask, self.tokenizer, tokens, sessions, on_token)
