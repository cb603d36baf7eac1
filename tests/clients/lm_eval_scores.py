"""Score and continue texts with lm-evaluation-harness, which knows only the server: python lm_eval_scores.py URL.

Prints JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

model = LocalCompletionsAPI(model="tiny", base_url=f"{sys.argv[1]}/v1/completions", batch_size=2, max_retries=1)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Return the harness's requests."""
    return [Instance(kind, {}, one, at, ("task", at, 1)) for at, one in enumerate(arguments)]  # type: ignore[arg-type]


pairs = asked("loglikelihood", ("abc d", "ef"), ("x", "yz."), ("The quick brown", " fox"), ("", "Hello"))
texts = asked("generate_until", ("abc", {"until": ["\x00"], "max_gen_toks": 5, "temperature": 0}))
answer = {
    "tokenizer": model.tokenizer_backend,
    "scores": model.loglikelihood(pairs),
    "rolling": model.loglikelihood_rolling(asked("loglikelihood_rolling", ("Hello, world",))),
    "texts": model.generate_until(texts),
}
print(json.dumps(answer))
