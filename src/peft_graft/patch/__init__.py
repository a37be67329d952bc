"""Hold values at indices: the patch, its file format, and the algebra of patches."""
