"""How far a package is from its checkpoint, and how far it may be."""
