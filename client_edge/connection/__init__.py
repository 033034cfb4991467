"""One client's connection with its server: joining, being alive, being lost, and coming back."""
