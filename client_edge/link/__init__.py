"""What a client asks of a server: files of the welcome, and steps and rounds of the training."""
