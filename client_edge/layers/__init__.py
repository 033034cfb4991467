"""The layers that stay with the text."""
