"""Reference results: the checkpoint computed by PyTorch."""
