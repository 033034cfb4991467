"""What the server writes down: its state, its log."""
