"""Bring a patch into a forward: in place, with a sparse gradient, or per row."""
