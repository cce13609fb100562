"""The Open Inference Protocol: its ``.proto``, the compiled descriptor, and message classes made of it."""
