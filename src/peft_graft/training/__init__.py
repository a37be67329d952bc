"""Find what masks and alpha need from data: scores, fitted scales, callbacks."""
