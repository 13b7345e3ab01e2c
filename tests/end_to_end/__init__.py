"""Tests with real container clients and the real server."""
