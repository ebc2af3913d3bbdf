"""What people look at: the page of a run, its figures, tables for the terminal. Nothing below imports it."""
