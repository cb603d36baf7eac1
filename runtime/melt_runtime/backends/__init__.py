"""Buffers and execution of a package, behind one protocol."""
