"""Who may say what next, and what has been applied: pure state, no clock, no socket, no torch."""
