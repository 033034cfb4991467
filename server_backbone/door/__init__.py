"""Who is there, what they say, and who takes it."""
