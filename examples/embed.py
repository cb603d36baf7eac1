"""The runtime inside your own program: python examples/embed.py PACKAGE [PROMPT]

PACKAGE is a directory, or hf://org/name[@revision] for one on a hub.
"""

import sys

from melt_runtime import MeltError, Runtime


def main(package: str, prompt: str | None = None) -> None:
    """Print an answer token by token, then an answer with one loop."""
    runtime = Runtime.load(package)
    prompt = prompt or runtime.example_prompt or "Once upon a time"
    for delta in runtime.stream(prompt, max_tokens=32):
        print(delta, end="", flush=True)
    shallow = runtime.generate(prompt, max_tokens=32, loops=1)
    print(f"\nwith one loop: {shallow.text}\nstate: {runtime.state_bytes():,} bytes, at any depth")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except MeltError as error:
        sys.exit(f"embed.py: {error}")
