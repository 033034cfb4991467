"""What people see of a run: display, report, page, plots."""
