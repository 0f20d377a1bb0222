"""The recipes that come with the package; `kdpipe recipes` lists them."""
