"""The DAT inference service: transports over one core, one batcher, one engine."""
