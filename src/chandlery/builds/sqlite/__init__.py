"""The build index as a SQLite file of this machine."""
