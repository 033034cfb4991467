"""Cutting a causal LM in three, loading one part of a checkpoint, and joining the parts again."""
