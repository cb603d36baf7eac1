"""From PyTorch modules to ONNX graphs in their final form."""
