"""`python -m chandlery` is the `chandlery` command."""

from chandlery.cli.main import main

if __name__ == "__main__":
    main()
