"""From a prompt to its tokens: chunks, loops, sequences."""
