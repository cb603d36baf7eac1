"""TensorRT and TensorRT-RTX engines: built on the device that runs them, without PyTorch and without onnx."""
