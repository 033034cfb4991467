"""What survives a crash: records with checksums, one log, and snapshots."""
