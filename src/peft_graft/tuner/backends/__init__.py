"""Work with quantized, sharded and offloaded bases, and with several processes."""
