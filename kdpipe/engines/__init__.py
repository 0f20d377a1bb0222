"""What samples and scores: one protocol, three engines."""
