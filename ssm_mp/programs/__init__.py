"""Blocks as compiled calls: what a block says is computed, and what runs it."""
