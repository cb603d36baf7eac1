"""TensorRT and TensorRT-RTX engines, built on the device without PyTorch and onnx."""
