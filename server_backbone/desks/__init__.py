"""Who takes which message: each desk decides about one thing, and gives back what is to be done."""
