"""The client: keeps the bottom, the top, the text and the labels."""
