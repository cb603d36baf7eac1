"""A server whose model says what it is told to: real in all but the choice of tokens, so that calls and reasoning are
written exactly as a trained model writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving import Server

# Each request takes the next reply. A token that a grammar forbids fails the request.
_BEFORE = """
import json, os
import numpy as np
from melt_runtime.scheduler import slots

replies = iter(json.loads(os.environ["MELT_TEST_REPLIES"]))

class Scripted:
    def __init__(self, sampler, tokens, prompt_tokens):
        self.params, self.tokens, self.prompt_tokens = sampler.params, tokens, prompt_tokens

    def sample(self, logits, history=()):
        token = self.tokens[len(history) - self.prompt_tokens]
        assert logits[token] > -np.inf, f"token {token} is forbidden after {history[self.prompt_tokens:]}"
        return token

class Sequence(slots.TokenSequence):
    def __init__(self, slot, prompt, options, tokenizer, **more):
        super().__init__(slot, prompt, options, tokenizer, **more)
        reply = next(replies, None)
        if reply is not None:
            self.sampler = Scripted(self.sampler, [*tokenizer.encode(reply), 1], len(prompt))

slots.TokenSequence = Sequence
"""


def scripted_server(package: Path, replies: Sequence[str], *options: Any) -> Server:
    """Start a server that gives these replies in turn, and then those of its model."""
    return Server(package, *options, before=_BEFORE, MELT_TEST_REPLIES=json.dumps(replies))


def with_template(checkpoint: Path, directory: Path, template: str, **renamed: str) -> Path:
    """Return a copy of a checkpoint with another chat template. ``renamed``: tokens by their names without brackets."""
    copy = Path(shutil.copytree(checkpoint, directory))
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = copy / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in renamed.items():
        text = text.replace(f"<{old}>", new)
    path.write_text(text, encoding="utf-8")
    return copy
