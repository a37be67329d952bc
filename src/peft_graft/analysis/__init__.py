"""Compute numbers and draw pictures of patches, checkpoints and predictions."""
