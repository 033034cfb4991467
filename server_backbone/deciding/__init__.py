"""What follows from what: gates, rounds, caches. Pure: no tensor, clock, socket or thread."""
