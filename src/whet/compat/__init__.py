"""The drop-in Python API: what scripts written for Unsloth import, with whet's engine behind it.

`from whet import FastLanguageModel` is the way in. `trl.py` is not imported here: it needs the extra
`whet[trl]`.
"""

from whet.compat.arguments import TrainingArguments
from whet.compat.chat import get_chat_template, train_on_responses_only
from whet.compat.models import (
    FastLanguageModel,
    FastModel,
    is_bf16_supported,
    is_bfloat16_supported,
)

__all__ = [
    "FastLanguageModel", "FastModel", "TrainingArguments", "get_chat_template", "is_bf16_supported",
    "is_bfloat16_supported", "train_on_responses_only",
]  # fmt: skip
