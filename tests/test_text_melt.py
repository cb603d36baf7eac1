"""The language model that the repository ships writes what its card says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakePackage
from melt_models.checkpoint import load_model
from melt_runtime import Runtime
from transformers import AutoTokenizer

MODEL = Path(__file__).parent.parent / "examples" / "text-melt"
RECORDED = json.loads((MODEL / "answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runtime(make_package: MakePackage) -> Runtime:
    return Runtime.load(make_package(MODEL))


@pytest.mark.parametrize("answer", RECORDED["answers"], ids=lambda answer: f"{answer['loops']} loops")
def test_the_text_model_continues_a_sentence_with_the_recorded_tokens(runtime: Runtime, answer: Any) -> None:
    found = runtime.generate(answer["prompt"], loops=answer["loops"], max_tokens=len(answer["tokens"]), pipeline="off")
    assert list(found.token_ids) == answer["tokens"]
    assert found.text == answer["text"]


@torch.no_grad()
def test_the_text_model_has_the_perplexity_of_its_card_on_a_page_that_it_never_read() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    model: Any = load_model(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "held_out.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    stated = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert [loops for loops, _, _ in stated] == ["1", "2", "3", "4"]
    for loops, in_chunks, by_token in stated:
        for size, perplexity in ((model.config.chunk_size, in_chunks), (1, by_token)):
            logits = model(ids[:, :-1], num_loops=int(loops), exit_threshold=1.0, chunk_size=size).logits
            found = math.exp(F.cross_entropy(logits[0], ids[0, 1:]))
            assert found == pytest.approx(float(perplexity), rel=0.01), (loops, size)
