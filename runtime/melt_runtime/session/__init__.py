"""Conversations that continue, branch, go back, and are saved in files."""
