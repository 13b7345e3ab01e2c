"""Layer plans: which store paths share a layer. Pure: no I/O."""
