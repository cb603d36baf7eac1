"""Explanations of figures in docs/experiments.md, found by a person. All other text there is computed.

A note stands at the end of its section, after the word "Why".
"""

from __future__ import annotations

_TEXTS: dict[str, str] = {
    "teacher": """
        At the paper's weights the seed that misses has a teacher whose squared attention outputs in the last
        loop are three times the other two's (182 against 57 and 60), so that the alignment term weighs three
        times as much for it; the next section shows that at this scale the term does more harm than good.
        With the smaller weight and Muon that seed also reaches its teacher's level. The teachers' weight decay
        was raised from 0.01 to 0.05 after a first student had reached 90%: attention outputs were three to nine
        times larger before. All runs shown here have the new teachers.
    """,
    "aggregations": """
        The order is the paper's, learned gates first and the last loop alone far behind, but at this width one
        learned gate per token does nearly as well as one per element (64); whether that changes with the
        width was not tested. The distance of `last` is larger than the paper's: these teachers' keys and values
        differ between loop 3 and loop 4 by about 0.7 of their norm and between loop 1 and loop 4 by more than
        their norm, so one loop's keys and values cannot replace them. With few seeds the signs mean more than
        the sizes.
    """,
    "left_out": """
        At the paper's weight attention alignment does harm here. Its term is a sum over 64 elements of a few units
        each: at 0.1 it contributes 1 to 6 to a loss whose divergence is 0.04 to 0.4, and the gradient is clipped at
        1, so it dominates the update. At 0.01 it does no harm, and no good either: at this scale the fault is the
        weight and not the idea. Without chunk-wise training nothing is right, as in the paper: training never sees
        the keys and values that decoding leaves. Without interpolation two seeds of three do not get started in this
        budget (the divergence stays at 1.4), and one does.
    """,
    "depth": """
        A student that was always trained to its last loop meets unfamiliar keys and values when tokens stop
        earlier or go on longer, and fails in both cases: with a shared cache, the loop that wrote the keys and
        values is part of what the next token reads. Drawing the depth at random in training mends the shallow
        side. Beyond the trained four loops nothing was trained, and accuracy soon falls, for the teachers too.
    """,
    "chunks": """
        Chunk sizes that training drew work alike. The whole prompt in one chunk works only where it was drawn.
    """,
}
NOTES = {name: " ".join(text.split()) for name, text in _TEXTS.items()}
