"""The stand-in for vLLM's OpenAI-style server: routes, validation, events and metrics."""
