"""The application that a server runs: its parts, what it logs and counts, its certificate."""
