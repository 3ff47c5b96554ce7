"""The forms that a result can be exported to, known without importing what writes them."""

from __future__ import annotations

FORMS = ("peft", "huggingface", "mixtral", "pt2", "standalone")
