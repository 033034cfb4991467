"""The model that a user's own training loop runs, whose backbone is on the server."""
