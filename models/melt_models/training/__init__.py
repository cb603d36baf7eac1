"""Training: from a LoopLM, or from nothing, to a MELT that keeps its quality."""
