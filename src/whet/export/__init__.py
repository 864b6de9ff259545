"""Write a run's result as somebody else's program wants it, and prove that it is the same model."""
