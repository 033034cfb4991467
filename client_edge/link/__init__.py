"""The way to the server: connections, files, and what comes back over them."""
