"""Generation by model name: which bodies write an answer, and how it went.

=============== ============================================================================================
``foundation``  the FM as it was loaded
``merged``      the FM with the merged adapter
``<domain>``    the DM at that domain's edge
``auto``        the DM of the device's own domain, and the FM where the DM is unsure: with the merged adapter or
                the domain's, as its routing says
=============== ============================================================================================
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from gaisnet.errors import GaisnetError, SessionRefused, UnknownModel
from gaisnet.models.tokenization import ending_ids
from gaisnet.serving.generation.decoding import BodySession, DeviceParts, Tokens, check_prompt, generate
from gaisnet.serving.generation.routing import Bodies, Place, Routing, Target, Trace, generate_routed
from gaisnet.serving.generation.speculation import DraftLength, Tally, generate_speculatively
from gaisnet.serving.generation.text import Sampling, text_of

AUTO, FOUNDATION, MERGED = "auto", "foundation", "merged"


@dataclass(frozen=True)
class Domain:
    """A served domain, with the names of its adapters at the services."""

    routing: Routing  # to the FM
    adapters: tuple[str, ...] = ("relay", "domain")  # on the DM


@dataclass(frozen=True)
class GenerationRequest:
    """A caller's request."""

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()  # strings that end the answer, and are not part of it
    domain: str | None = None  # for ``auto``: a domain other than the device's own
    speculate: bool | None = None  # whether the DM drafts for the FM; None for the device's setting
    continues: bool = False  # the answer continues the prompt's text, and may begin with a space


@dataclass
class Course:
    """The course of an answer, so far or at its end."""

    body: Place
    domain: str
    trace: Trace | None = None  # of a routed answer
    tally: Tally | None = None  # of a speculative one
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # written so far, the one that ends the answer included
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def now(self) -> Place:
        """The body that writes now."""
        return self.body if self.trace is None else self.trace.current_body

    @property
    def escalated_at(self) -> int | None:
        """Number of the first token that the FM wrote instead of the DM; later ones are the FM's, too."""
        return None if self.trace is None else self.trace.escalated_at

    @property
    def cloud_refused(self) -> bool:
        """Whether the DM was unsure and had to go on because the cloud refused."""
        return self.trace is not None and self.trace.refusal is not None


def _nobody() -> None:
    """Ignore tokens."""


@dataclass
class Answer:
    """An answer in progress: iterate over its text once. ``close`` it from any thread to stop it."""

    course: Course
    _ask: GenerationRequest
    _tokenizer: PreTrainedTokenizerBase
    _tokens: Tokens
    _sessions: Sequence[BodySession]
    _on_token: Callable[[], None] = _nobody
    _closed: bool = field(default=False)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; none after ``close``. Raises a ``GaisnetError`` if a body fails."""
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
        """Free the sessions at once, even while a body works for them."""
        self._closed = True
        for session in self._sessions:
            with suppress(GaisnetError):  # an unreachable body frees it by itself
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
    """Writes answers, any number at once, each in its caller's thread.

    Args:
        parts: The device's parts.
        tokenizer: The FM's tokenizer.
        bodies: The bodies to ask.
        domains: Served domains, by name.
        home: The device's own domain, used by ``auto``.
        speculate: Whether the DM drafts for the FM, unless a request says otherwise.
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
        """Names of models that a request may give."""
        return AUTO, FOUNDATION, MERGED, *self._domains

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._parts.context

    def route(self, name: str, routing: Routing) -> None:
        """Change the routing of ``auto`` in a domain; answers in progress keep theirs."""
        self._domains[name] = replace(self._domains[name], routing=routing)

    def check_model(self, name: str) -> None:
        """Raise ``UnknownModel`` unless the model is served."""
        if name not in self.models:
            raise UnknownModel(name, self.models)

    def begin(self, ask: GenerationRequest, on_token: Callable[[], None] = _nobody) -> Answer:
        """Open the sessions of an answer; computation starts when it is iterated. Close an answer that is not iterated.

        Args:
            ask: The request. Tokens that end an answer are added to its own.
            on_token: Called for each token.

        Raises:
            UnknownModel: An unknown model or domain.
            SessionRefused, ContextFull: The prompt cannot be answered.
            GaisnetError: An error of a body.
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
        """Return the domain of the DM, whose edge is also on the way to the FM."""
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
        """Return whether the FM writes and the DM drafts. Raises ``SessionRefused`` if only the request wants that."""
        if ask.model in self._domains:
            possible, found = False, f"'{ask.model}' is the model that drafts"
        else:
            never = ask.model == AUTO and self._domains[name].routing.policy == "never"
            possible, found = not never, "this device asks the foundation model for nothing"
        if ask.speculate and not possible:
            raise SessionRefused("speculation", found, "leave it out, or ask for 'auto', 'foundation' or 'merged'")
        return possible and (self._speculate if ask.speculate is None else ask.speculate)

    def _target(self, ask: GenerationRequest, name: str) -> Target:
        """Return the body to which an answer of this model is attributed."""
        if ask.model in self._domains:
            return self._drafter(name)
        on_foundation = {FOUNDATION: (), MERGED: (MERGED,), AUTO: self._domains[name].routing.adapters}
        return Target("cloud", on_foundation[ask.model], name)

    def _drafter(self, name: str) -> Target:
        return Target("edge", self._domains[name].adapters, name)

    def _plain(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        target = self._target(ask, name)
        session = self._bodies.open_session(target, *self._span(ask))
        tokens = generate(self._parts, session, ask.prompt, ask.sampling)
        return self._answer(Course(target.body, name), ask, tokens, [session], on_token)

    def _routed(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        session, trace = self._bodies.open_escalating_session(self._drafter(name), *self._span(ask)), Trace()
        routing = self._domains[name].routing
        tokens = generate_routed(self._parts, session, ask.prompt, ask.sampling, routing, trace)
        return self._answer(Course("edge", name, trace=trace), ask, tokens, [session], on_token)

    def _speculative(self, ask: GenerationRequest, name: str, on_token: Callable[[], None]) -> Answer:
        checker = self._bodies.open_session(self._target(ask, name), *self._span(ask))
        try:
            drafter = self._bodies.open_session(self._drafter(name), *self._span(ask))
        except GaisnetError:
            checker.close()
            raise
        tally = Tally()
        tokens = generate_speculatively(
            self._parts, drafter, checker, ask.prompt, ask.sampling, length=DraftLength(), tally=tally
        )
        return self._answer(Course("cloud", name, tally=tally), ask, tokens, [drafter, checker], on_token)

    def _span(self, ask: GenerationRequest) -> tuple[int, int, int]:
        """Return the body's layers, and the positions to reserve memory for."""
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
