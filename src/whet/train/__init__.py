"""One training run: the recipe, the Trainer it drives, and what it tells while it runs."""
