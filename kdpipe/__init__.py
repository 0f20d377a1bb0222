"""kdpipe: on-policy knowledge distillation of language models, one resumable step at a time."""

__version__ = "0.1.0"

import os

# pydantic would read the metadata of every installed package for plugins: a tenth of what `kdpipe plan` costs.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
