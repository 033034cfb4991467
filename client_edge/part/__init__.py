"""A client's part in a run, from joining to its last words."""
