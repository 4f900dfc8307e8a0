"""A frozen decoder with a slot in every layer, and the readers that bring one from disk."""
