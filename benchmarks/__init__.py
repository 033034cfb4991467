"""Measurements of splitfl: each module runs alone, prints a table and writes JSON."""
