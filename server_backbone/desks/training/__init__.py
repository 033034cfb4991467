"""Rounds from their opening to their end, and the steps in them."""
