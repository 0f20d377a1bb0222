"""A model being trained: the trainer, its state on disk, and the average of its weights."""
