"""Read a saved adapter, write its model card, and give it names that others can follow."""
