"""The server role: hosts the backbone and merges the clients' layers. `python -m server_backbone --config server.toml`."""
