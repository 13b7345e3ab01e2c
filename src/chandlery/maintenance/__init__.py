"""What keeps a data folder in order: garbage collection, scrubbing, repair."""
