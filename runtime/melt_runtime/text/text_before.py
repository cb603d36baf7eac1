"""What a text continues: the end of the prompt, on which the text of the tokens after it depends."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import dropwhile, islice
from typing import NamedTuple

from .tokenizer import TextTokenizer

# UTF-8 has at most 4 bytes per character and a byte-level token at least one byte, so 8 tokens contain a boundary after
# which decoding from mid-text agrees with decoding everything.
CONTEXT = 8


class TextBefore(NamedTuple):
    """The end of a text that goes on.

    ``tokens``: up to 8 of its last tokens, without those that are not shown and without a finished run of byte-fallback
    tokens. ``open``: the bytes at its end that are part of a character; they belong to the text that follows. Both are
    empty at the beginning of a text.
    """

    tokens: tuple[int, ...] = ()
    open: bytes = b""

    def shown(self, tokenizer: TextTokenizer) -> int:
        """Return how many characters of the tokens' text belong to the text before."""
        if tokenizer.token_bytes.byte_fallback:
            return len(_decoded(tokenizer, self.tokens[: len(self.tokens) - len(self.open)]))
        return len(_decoded(tokenizer, self.tokens)) - bool(self.open)


def text_before(tokenizer: TextTokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> TextBefore:
    """Return what the text of the tokens after a prompt continues. Raises PromptError for impossible ids."""
    of = tokenizer.token_bytes
    shown = (token for token in reversed(prompt) if tokenizer.shows(token, skip_special_tokens))
    tokens = tuple(islice(shown, CONTEXT))[::-1]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(b"".join(map(of.of, tokens)))
    begun = decoder.getstate()[0]
    if of.byte_fallback:
        run = next((at for at, token in enumerate(reversed(tokens)) if not of.is_byte(token)), len(tokens))
        begun = begun[-run:] if run else b""
        if run < len(tokens):
            # Else decode() would replace the prompt's characters, too, where the run goes on with broken ones.
            tokens = (*tokens[: len(tokens) - run], *tokens[len(tokens) - len(begun) :])
        else:  # the run may have begun earlier, inside a character
            tokens = tuple(dropwhile(lambda token: of.of(token)[0] & 0xC0 == 0x80, tokens)) or tokens
    return TextBefore(tokens, begun)


def closed_text(tokenizer: TextTokenizer, prompt: Sequence[int]) -> str:
    """Return a prompt's text without the part of a character at its end, which belongs to the text that follows."""
    count = len(text_before(tokenizer, prompt).open)
    if not count:
        return tokenizer.decode(prompt)
    if tokenizer.token_bytes.byte_fallback:
        return tokenizer.decode([token for token in prompt if tokenizer.shows(token, True)][:-count])
    return tokenizer.decode(prompt)[:-1]


def _decoded(tokenizer: TextTokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)
