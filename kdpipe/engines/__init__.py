"""Backends of the Engine protocol: one module each, the only place that imports that library."""
