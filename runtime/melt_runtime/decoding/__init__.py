"""From a prompt to its tokens: loops, chunks, sequences."""
