"""The machine: locks, files, processes, downloads, archives."""
