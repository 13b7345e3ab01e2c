"""`chandlery doctor`: how a machine is examined, and what is looked at."""
