"""Conversations that go on, branch, go back, and lie in files."""
