"""The mathematics: losses, objective, micro-batch, mixtures, mismatch and statistics."""
