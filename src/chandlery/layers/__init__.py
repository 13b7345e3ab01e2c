"""Layers: store paths as deterministic, compressed tar archives; the root filesystem layer."""
