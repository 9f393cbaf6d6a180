"""Measures models on labelled images, by the way that requests take."""
