"""What crosses the wire: messages, their bytes, and the step from described to real tensors."""
