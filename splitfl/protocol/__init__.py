"""What crosses the wire: messages, their bytes, and the step from frames to tensors."""
