"""Training of LoopLM teachers and their distillation into MELT."""
