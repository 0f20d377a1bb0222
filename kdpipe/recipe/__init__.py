"""The recipe: the only schema and the only defaults."""
