"""A call of a compiled model: the step, the stream, the caches, the choice of a variant. No FX."""
