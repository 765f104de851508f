"""``compile`` and what undoes it, and the forward that stands in the model's place."""
