"""What this client allows, and what it has agreed to."""
