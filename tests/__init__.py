"""Tests; CONTRIBUTING.md says where new ones go."""
