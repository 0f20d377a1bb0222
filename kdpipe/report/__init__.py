"""Results as one HTML page: a template, charts, and completions token by token."""
