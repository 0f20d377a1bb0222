"""The engine that runs vLLM."""
