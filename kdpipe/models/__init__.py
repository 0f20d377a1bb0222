"""A model folder: opened, prompted, batched, run, adapted and cached."""
