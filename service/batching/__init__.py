"""When an image leaves the queue: admission, batches, devices."""
