"""Export of MELT and LoopLM checkpoints to ONNX packages, verified against PyTorch."""
