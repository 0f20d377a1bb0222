"""kdpipe: on-policy knowledge distillation of language models, one resumable step at a time."""

__version__ = "0.1.0"
