"""The demo segmenter: scenes with a class for each pixel, and its training."""
