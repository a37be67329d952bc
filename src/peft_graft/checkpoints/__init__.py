"""Read a base and a donor side by side, streamed from disk or memory."""
