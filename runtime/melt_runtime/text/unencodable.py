"""Find the characters of a text that a tokenizer cannot encode and has no unknown token for."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, models, pre_tokenizers


def drops_characters(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer silently drops characters without a token, as BPE without unknown token or all bytes
    does."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.unk_token is not None or model.byte_fallback:
        return False
    steps = (tokenizer.pre_tokenizer, tokenizer.normalizer)
    if not any(step is not None and b'"ByteLevel"' in step.__getstate__() for step in steps):
        return True
    return any(tokenizer.token_to_id(symbol) is None for symbol in pre_tokenizers.ByteLevel.alphabet())


def lacking(tokenizer: Tokenizer, text: str) -> str | None:
    """Name the first character or word of a text without a token, in a sentence; None if all have tokens."""
    added = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
    pattern = "|".join(map(re.escape, filter(None, added)))
    for part in re.split(pattern, text) if pattern else [text]:
        plain = part if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(part)
        pieces = [plain]
        if tokenizer.pre_tokenizer is not None:
            pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain)]
        for piece in dict.fromkeys(pieces):
            if not _known(tokenizer, piece):
                return _named(tokenizer, piece, text)
    return None


def _named(tokenizer: Tokenizer, piece: str, text: str) -> str:
    wrong = piece
    if not isinstance(tokenizer.model, models.WordLevel):
        wrong = next((character for character in piece if not _known(tokenizer, character)), piece)
    place = text.find(wrong)
    where = "" if place < 0 else f" at character {place}"
    what = "character" if len(wrong) == 1 else "word"
    return f"The tokenizer has no token for the {what} {wrong[:100]!r}{where}, and none for unknown ones"


def _known(tokenizer: Tokenizer, piece: str) -> bool:
    """Return whether the model has tokens for all of a piece."""
    if not piece:
        return True
    try:
        tokens = tokenizer.model.tokenize(piece)
    except Exception:  # the library raises plain Exception
        return False
    if not isinstance(tokenizer.model, models.BPE):
        return bool(tokens)
    return sum(len(token.value) for token in tokens) >= len(piece)
