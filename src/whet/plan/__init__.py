"""The planner: memory is known before a run, and what fits is chosen (docs/design.md)."""
