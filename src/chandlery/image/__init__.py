"""What an image name means. Pure: no I/O."""
