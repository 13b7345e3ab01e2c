"""Settings: where each comes from, what is wrong with one, how they are shown."""
