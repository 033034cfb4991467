"""The client's text: read, split, packed, batched."""
