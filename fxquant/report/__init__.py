"""One self-contained HTML page and a table for the terminal."""
