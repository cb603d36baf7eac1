"""What a looped model would say after every loop: python examples/logit_lens.py PACKAGE [PROMPT] [PICTURE.png] [--chat]

--chat puts the prompt into the package's chat template; else the model reads the bare text. The picture needs
matplotlib: pip install matplotlib
"""

import sys
from pathlib import Path

import numpy as np
from melt_runtime import MeltError, Runtime


def likeliest(runtime: Runtime, prompt: str | list[int]) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Return the prompt's tokens, the likeliest next token per loop and token, and its probability (loops, tokens)."""
    states = runtime.loops(prompt)
    logits = states.logits
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    said = [[shown(runtime, token) for token in row] for row in logits.argmax(-1).tolist()]
    return [shown(runtime, token) for token in states.token_ids], said, 1 / shares.sum(-1)


def shown(runtime: Runtime, token: int) -> str:
    """Return a token's text, with its spaces visible, special tokens by name, and one without text by its id."""
    text = "" if runtime.tokenizer is None else runtime.tokenizer.decode([token], skip_special_tokens=False)
    return repr(text)[1:-1].replace(" ", "·") or f"#{token}"


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


def main(package: str, prompt: str | None = None, picture: str | None = None, *, chat: bool = False) -> None:
    """Print a line per loop, and draw the picture if asked for."""
    runtime = Runtime.load(package)
    prompt = prompt or runtime.example_prompt or "Once upon a time"
    if chat:
        read, said, share = likeliest(runtime, runtime.chat_prompt([{"role": "user", "content": prompt}]))
    else:
        read, said, share = likeliest(runtime, prompt)
        if runtime.tokenizer is not None and runtime.tokenizer.has_chat_template:
            print("the model reads the bare text; --chat puts it into the chat template", file=sys.stderr)
    width = max(map(len, [*read, *(text for row in said for text in row)]))
    print(f"{'read':>8}  " + " ".join(text.ljust(width) for text in read))
    for loop, row in enumerate(said, 1):
        print(f"{f'loop {loop}':>8}  " + " ".join(text.ljust(width) for text in row))
    if picture is not None:
        draw(Path(picture), read, said, share)


if __name__ == "__main__":
    try:
        arguments = [one for one in sys.argv[1:] if one != "--chat"]
        main(*arguments[:3], chat="--chat" in sys.argv)
    except MeltError as error:
        sys.exit(f"logit_lens.py: {error}")
