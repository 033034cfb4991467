"""The server role: hosts the backbone, merges the clients' layers. `python -m server_backbone --config server.toml`."""
