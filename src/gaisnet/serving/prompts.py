"""What a caller sends, as token ids: a chat through the tokenizer's own template, or a prompt as it stands."""

from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gaisnet.models.chat_template import rendered_chat


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids up to where the assistant's next message begins.

    Args:
        tokenizer: The FM's.
        messages: ``role`` and ``content`` of each.

    Raises:
        SessionRefused, ServiceFull: See ``models.chat_template.rendered_chat``.
    """
    return prompt_ids(tokenizer, rendered_chat(tokenizer, messages))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text, and nothing before it."""
    return tuple(cast(list[int], tokenizer.encode(text, add_special_tokens=False)))


def ending_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end an answer, as tokenizer and model say."""
    found = config.eos_token_id
    of_model = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *of_model) if token is not None)
