"""The Open Inference Protocol, version 2: from tensors to the tasks, and back."""
