"""Measurements; a result that is cited stands in results/ with its machine, versions and date."""
