"""The Open Inference Protocol, as far as both transports share it."""
