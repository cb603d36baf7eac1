"""ONNX graphs in their final form, made from PyTorch modules."""
