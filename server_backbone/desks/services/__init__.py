"""Services that belong to no round: files, generations, snapshots."""
