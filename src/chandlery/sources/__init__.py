"""Package sources: where package sets come from, and the pins that make each immutable."""
