"""What the command line shows: pure functions of data that return or print `rich` objects."""
