"""What both sides do alike when they train: the optimizer, its schedule, clipping, and seeds."""
