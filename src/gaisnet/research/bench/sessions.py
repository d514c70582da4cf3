"""Speed of sessions: one against the unsplit model, many against one, and a speculating pair."""

from collections.abc import Iterator
from dataclasses import dataclass

from gaisnet.research.bench.rounds import Rounds
from gaisnet.research.bench.spread import Spread
from gaisnet.research.bench.writing import Prompt, Unsplit, Writers, num_same
from gaisnet.serving.generation.routing import Target
from gaisnet.serving.generation.speculation import DraftLength, Tally, generate_speculatively
from gaisnet.serving.generation.text import Sampling


@dataclass(frozen=True)
class Single:
    """One split session against the unsplit model."""

    split: Spread  # tokens/s
    whole: Spread  # tokens/s
    ratio: Spread
    num_same: int  # equal answers, all rounds


@dataclass(frozen=True)
class Batch:
    """Many concurrent sessions against one."""

    many: Spread  # tokens/s, after all have read their prompts
    ratio: Spread
    ratio_with_prompts: Spread


@dataclass(frozen=True)
class Speculated:
    """Drafts of one body, verified by another."""

    tokens_per_check: Spread
    num_same: int  # answers equal to those without drafts


def single(writers: Writers, target: Target, unsplit: Unsplit, rounds: Rounds, stage: str) -> Single:
    """Time the same prompts in turn, round by round, after an uncounted warm-up."""
    num_tokens, same = rounds.effort.tokens, 0
    split_s: list[float] = []
    whole_s: list[float] = []
    ratios: list[float] = []
    writers.one_by_one(target, rounds.prompts[:1], num_tokens)  # loads whatever is loaded only once
    unsplit.write(rounds.prompts[:1], num_tokens)
    for prompts in rounds.each_round(stage, rounds.effort.prompts, ratios):
        split, whole = writers.one_by_one(target, prompts, num_tokens), unsplit.write(prompts, num_tokens)
        same += num_same(split.answers, whole.answers)
        split_s.append(split.tokens_per_s)
        whole_s.append(whole.tokens_per_s)
        ratios.append(split.tokens_per_s / whole.tokens_per_s)
    return Single(Spread.summarize(split_s), Spread.summarize(whole_s), Spread.summarize(ratios), same)


def batch(writers: Writers, target: Target, rounds: Rounds, stage: str) -> Batch:
    """Time the first prompt of a round alone, then all of them together."""
    effort = rounds.effort
    speeds: list[float] = []
    ratios: list[float] = []
    with_prompts: list[float] = []
    for prompts in rounds.each_round(stage, effort.at_once, ratios):
        one = writers.one_by_one(target, prompts[:1], effort.tokens)
        many = writers.at_once(target, prompts, effort.tokens)
        speeds.append(many.writing_tokens_per_s)
        ratios.append(many.writing_tokens_per_s / one.writing_tokens_per_s)
        with_prompts.append(many.tokens_per_s / one.tokens_per_s)
    return Batch(Spread.summarize(speeds), Spread.summarize(ratios), Spread.summarize(with_prompts))


def speculation(writers: Writers, drafter: Target, checker: Target, rounds: Rounds) -> Speculated:
    """Time answers with and without drafts."""
    calls: list[float] = []
    same, num_tokens = 0, rounds.effort.tokens
    for prompts in rounds.each_round("speculation", rounds.effort.prompts, calls):
        length, tally = DraftLength(), Tally()
        answers = [tuple(_drafted(writers, drafter, checker, p, num_tokens, length, tally)) for p in prompts]
        same += num_same(answers, writers.one_by_one(checker, prompts, num_tokens).answers)
        calls.append(tally.num_tokens / tally.num_checks)
    return Speculated(Spread.summarize(calls), same)


def _drafted(
    writers: Writers,
    drafter: Target,
    checker: Target,
    prompt: Prompt,
    num_tokens: int,
    length: DraftLength,
    tally: Tally,
) -> Iterator[int]:
    parts, num_positions = writers.parts, len(prompt) + num_tokens
    drafts, checks = (
        writers.bodies.open_session(target, parts.first, parts.stop, num_positions) for target in (drafter, checker)
    )
    return generate_speculatively(parts, drafts, checks, prompt, Sampling(max_tokens=num_tokens), length, tally)
