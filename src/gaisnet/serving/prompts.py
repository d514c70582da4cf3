"""What a caller sends, as token ids: a chat through the tokenizer's own template, or a prompt as it stands."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gaisnet.errors import SessionRefused


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids up to where the assistant's next message begins.

    Args:
        tokenizer: The FM's.
        messages: ``role`` and ``content`` of each.

    Raises:
        SessionRefused: The tokenizer has no template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        found, do = "the model's tokenizer has no chat template", "use a completion, or a model made for chats"
        raise SessionRefused("a chat", found, do)
    try:
        text: Any = tokenizer.apply_chat_template(list(map(dict, messages)), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise SessionRefused("a chat", f"the model's template refuses it ({error})", "change the messages") from error
    return prompt_ids(tokenizer, text)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text, and nothing before it."""
    return tuple(cast(list[int], tokenizer.encode(text, add_special_tokens=False)))


def ending_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end an answer, as tokenizer and model say."""
    found = config.eos_token_id
    of_model = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *of_model) if token is not None)
