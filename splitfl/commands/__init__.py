"""The sub-commands that belong to neither role."""
