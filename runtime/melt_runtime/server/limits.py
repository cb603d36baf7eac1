"""What a server allows where nothing else is said."""

from __future__ import annotations

MAX_SECONDS = 600.0  # of a call: as long as OpenAI's clients wait
MAX_UNREAD = 1 << 15  # tokens; one takes a few hundred bytes, with twenty logprobs two or three thousand
STALLED = 30.0  # seconds without a step after which the scheduler counts as stuck
DEEPER = 4  # times the package's loops
