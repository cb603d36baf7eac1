"""Whatever a body holds, it is read or refused in one sentence; nothing else is raised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_runtime.server.chat_schema import ChatBody
from melt_runtime.server.failures import ApiError
from melt_runtime.server.intake import parsed
from melt_runtime.server.schema import CompletionBody

INNER = {"role", "content", "type", "text", "schema", "ünknown"}
FIELDS = sorted(INNER | {*ChatBody.model_fields, *CompletionBody.model_fields})
WORDS = ["user", "assistant", "tool", "text", "image_url", "json_schema", "none", "auto", "\x00", "~ids"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("tiny") | VALUES, "prompt": st.just("a") | VALUES, "messages": VALUES},
    optional={name: VALUES for name in FIELDS if name not in ("model", "prompt", "messages")},
)


def read(kind: type[Any], body: bytes) -> None:
    found: Any
    try:
        found = parsed(kind, body)
    except ApiError as error:
        found = error
    if isinstance(found, ApiError):
        assert found.status == 400
        assert "\n" not in str(found)
        assert len(str(found)) < 1000
        assert found.response().body
    else:
        assert isinstance(found, kind)


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
@settings(max_examples=150, deadline=None)
@given(body=BODIES)
def test_any_object_is_read_or_refused(kind: type[Any], body: dict[str, Any]) -> None:
    other = "prompt" if kind is ChatBody else "messages"
    text = json.dumps({name: value for name, value in body.items() if name != other})
    read(kind, text.encode())
    read(kind, text.encode()[: len(text) // 2])


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(body: bytes) -> None:
    read(CompletionBody, body)
