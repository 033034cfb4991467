"""The client's own records: its steps, snapshots, and where it is by them."""
