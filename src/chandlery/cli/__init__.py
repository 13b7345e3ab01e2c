"""Commands: `chandlery serve`, `build`, `plan` and the others, a module for each."""
