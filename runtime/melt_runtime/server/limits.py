"""Default limits of a server."""

from __future__ import annotations

MAX_SECONDS = 600.0  # per call: as long as OpenAI's clients wait
MAX_UNREAD = 1 << 15  # tokens; each takes a few hundred bytes, or up to 3,000 with twenty logprobs
STALLED = 30.0  # seconds without a step after which the scheduler counts as stuck
LOOP_FACTOR = 4  # the most loops per token, in multiples of the package's
