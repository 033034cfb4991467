"""The blocks, their gradients and optimizer, and the queue of the thread that runs them."""
