"""Clients that come, go, or are waited for."""
