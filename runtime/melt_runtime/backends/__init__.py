"""Backends: the buffers and execution of a package, behind one protocol."""
