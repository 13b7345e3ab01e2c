"""Package sets in git repositories."""
