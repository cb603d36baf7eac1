"""What a package consists of, read and checked."""
