"""What a person found out about the figures and no program can say. Everything else in docs/experiments.md is computed.

A note is printed at the end of its section, after the words "Why".
"""

from __future__ import annotations

_TEXTS: dict[str, str] = {
    "teacher": """
        At the paper's weights the seed that misses has a teacher whose squared attention outputs in the last
        loop are three times the other two's (182 against 57 and 60), so that the alignment term weighs three
        times as much for it; the next section shows that this term costs more than it brings at this scale.
        With the smaller weight and Muon that seed is at its teacher's level as well. The teachers' weight decay
        was raised from 0.01 to 0.05 after a first student had reached 90%: attention outputs were three to nine
        times larger before. All runs shown here have the new teachers.
    """,
    "aggregations": """
        The order is the paper's, learned gates first and the last loop alone far behind, but at this width one
        learned number a token does nearly as well as one for each of 64 elements; whether that changes with the
        width was not tested. The distance of `last` is larger than the paper's: these teachers' keys and values
        differ between loop 3 and loop 4 by about 0.7 of their norm and between loop 1 and loop 4 by more than
        their norm, which one loop's rows cannot stand in for. With few seeds the signs mean more than the
        sizes.
    """,
    "left_out": """
        At the paper's weight attention alignment does harm here. Its term is a sum over 64 elements of a few units
        each: at 0.1 it contributes 1 to 6 to a loss whose divergence is 0.04 to 0.4, and the gradient is clipped at
        1, so it takes over the update. At 0.01 the harm is gone and there is no gain over leaving it out: it is the
        weight, at this scale, and not the idea. Without chunk-wise training nothing is right, as in the paper:
        training never sees the rows that decoding leaves. Without interpolation two seeds of three do not leave the
        start in this budget (the divergence stays at 1.4), and one does.
    """,
    "depth": """
        A student that was only trained with its rows left at the last loop finds rows that it never saw when
        all tokens stop earlier or go on longer, and fails on both sides: the shared cache ties the depth of
        reading to the depth of writing. Drawing the depth in training mends the shallow side; beyond the
        trained four loops nothing was trained and nothing holds for long, for the teachers neither.
    """,
    "chunks": """
        Sizes that training drew work alike; the whole prompt at once works where it was drawn.
    """,
}
NOTES = {name: " ".join(text.split()) for name, text in _TEXTS.items()}
