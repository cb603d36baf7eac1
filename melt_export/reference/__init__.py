"""What PyTorch computes, which every package is compared with."""
