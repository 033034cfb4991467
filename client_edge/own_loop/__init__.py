"""The client's own training loop, with the backbone behind it."""
