"""`python -m chandlery` is the `chandlery` command."""

from chandlery.cli import main

if __name__ == "__main__":
    main()
