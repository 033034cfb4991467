"""The work of the compute thread, each part written down before anybody hears of it."""
