"""What a looped model would say after every loop: python examples/logit_lens.py PACKAGE [PROMPT] [PICTURE.png]

The picture needs matplotlib: pip install matplotlib
"""

import sys
from pathlib import Path

import numpy as np
from melt_runtime import MeltError, Runtime


def likeliest(runtime: Runtime, prompt: str) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Return the prompt's tokens, the likeliest next token per loop and token, and its probability (loops, tokens)."""
    states = runtime.loops(prompt)
    logits = states.logits
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    said = [[shown(runtime, token) for token in row] for row in logits.argmax(-1).tolist()]
    return [shown(runtime, token) for token in states.token_ids], said, 1 / shares.sum(-1)


def shown(runtime: Runtime, token: int) -> str:
    """Return a token's text, with its spaces visible."""
    return str(token) if runtime.tokenizer is None else repr(runtime.tokenizer.decode([token]))[1:-1].replace(" ", "·")


def draw(picture: Path, read: list[str], said: list[list[str]], share: np.ndarray) -> None:
    """Draw a row per loop and a column per token: what would follow it, on its probability."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loops, tokens = share.shape
    figure, axes = plt.subplots(figsize=(1.5 + 0.7 * tokens, 1.5 + 0.4 * loops), layout="constrained")
    image = axes.imshow(share, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for loop in range(loops):
        for at in range(tokens):
            dark = "white" if share[loop, at] > 0.6 else "black"
            axes.text(at, loop, said[loop][at][:8], ha="center", va="center", fontsize=8, color=dark, parse_math=False)
    axes.set_xticks(range(tokens), [f"after {text[:8]}" for text in read], rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(loops), [f"loop {loop + 1}" for loop in range(loops)])
    figure.colorbar(image, label="probability of the likeliest token")
    figure.savefig(picture, dpi=150)


def main(package: str, prompt: str | None = None, picture: str | None = None) -> None:
    """Print a line per loop, and draw the picture if asked for."""
    runtime = Runtime.load(package)
    read, said, share = likeliest(runtime, prompt or runtime.example_prompt or "Once upon a time")
    width = max(map(len, [*read, *(text for row in said for text in row)]))
    print(f"{'read':>8}  " + " ".join(text.ljust(width) for text in read))
    for loop, row in enumerate(said, 1):
        print(f"{f'loop {loop}':>8}  " + " ".join(text.ljust(width) for text in row))
    if picture is not None:
        draw(Path(picture), read, said, share)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except MeltError as error:
        sys.exit(f"logit_lens.py: {error}")
