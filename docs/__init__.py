"""The pages that `kdpipe docs` prints."""
