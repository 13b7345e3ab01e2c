"""The embedded package set: suites of Debian."""
