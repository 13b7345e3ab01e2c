"""A container registry whose images are built from Nix packages the moment they are pulled."""

__version__ = "0.2.0"
