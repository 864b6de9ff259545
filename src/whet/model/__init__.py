"""From a model's name to a model in memory, with or without an adapter."""

from typing import Any, TypeAlias

# A transformers model or a peft wrapper of one, and a tokenizer of any kind. The annotations of the
# two libraries contradict each other (and themselves) too often for a stricter name to help.
CausalLM: TypeAlias = Any
Tokenizer: TypeAlias = Any
