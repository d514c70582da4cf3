"""Tiny tokenizers of the kinds that decoders come with, made as transformers loads them."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>")
"""The last ends an answer, too: it is no tokenizer's end-of-sequence token."""
PIECES = tuple("abcdehilmnoprstuvwxyzINSTYASKHU0123456789.,:;?!-_()/'\"<>|[]\n")
_WORDS = ("ye", "yes", "no", "th", "the", "in", "er", "is", "so", "so?")
_MERGES = [("y", "e"), ("ye", "s"), ("n", "o"), ("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("i", "s"), ("s", "o")]
_SPACED = [("▁", "▁"), ("▁", "yes"), ("▁", "no"), ("▁", "the"), ("▁", "is"), ("?", "yes")]
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _numbered(*groups: tuple[str, ...]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(piece for group in groups for piece in group))}


def _spaced_vocabulary() -> dict[str, int]:
    merged = tuple(left + right for left, right in (*_MERGES, *_SPACED))
    return _numbered(SPECIAL, _BYTES, PIECES, ("▁",), merged)


def byte_level() -> Tokenizer:
    """GPT-2's, Llama 3's: bytes as letters."""
    letters = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merged = tuple(left + right for left, right in _MERGES)
    vocabulary = _numbered(SPECIAL, letters, merged, ("Ġyes", "Ġno"))
    merges = [*_MERGES, ("Ġ", "yes"), ("Ġ", "no")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's, Mistral's: a space before a text, and bytes in place of unknown characters."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_spaced_vocabulary(),
            merges=[*_MERGES, *_SPACED],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def prefix_space() -> Tokenizer:
    """As sentencepiece's, with words cut apart, and no bytes: an unknown character is lost."""
    vocabulary = _spaced_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[*_MERGES, *_SPACED], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return tokenizer


def unigram() -> Tokenizer:
    """T5's, Gemma's kind: the likeliest pieces; special tokens are among them."""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(byte, -20.0) for byte in _BYTES]
    words = [(word, -3.0 - 0.1 * number) for number, word in enumerate(("▁yes", "▁no", "▁the", *_WORDS))]
    pieces += words + [(letter, -6.0) for letter in ("▁", *PIECES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: words, and pieces that go on from one."""
    letters = tuple(f"##{piece}" for piece in (*PIECES, *_WORDS))
    vocabulary = _numbered(SPECIAL, PIECES, letters, _WORDS)
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (byte_level, byte_fallback, prefix_space, unigram, word_piece)
}


def tokenizer_of(kind: str, bos: bool = True, closes: bool = False) -> PreTrainedTokenizerFast:
    """One of a kind; ``bos``: it opens a text; ``closes``: and closes it, too."""
    backend = KINDS[kind]()
    number = {token: backend.token_to_id(token) for token in SPECIAL}
    around = f"{'<s> ' if bos else ''}$A{' </s>' if closes else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, number[token]) for token in ("<s>", "</s>") if token in around]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, additional_special_tokens=["<|end|>"])
