"""Who may pull what, and how often."""
