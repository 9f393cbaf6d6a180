"""Pictures of what a model said of an image: plain shapes, drawn as pixels or as SVG."""
