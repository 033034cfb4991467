"""Split learning against full federated learning and its alternatives: see `__main__` for what is compared."""
