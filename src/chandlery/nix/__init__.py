"""Nix: the only caller of its programs, what they print, its store; `expressions/` has the Nix code."""
