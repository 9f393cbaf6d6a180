"""The bundled model `dat_nano`: its scenes, training, evaluation and pictures."""
