"""Families of looped models with public weights: how each one's config and tensor names become the core's."""
