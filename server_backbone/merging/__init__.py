"""The clients' layers made into everyone's."""
