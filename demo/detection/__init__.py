"""The bundled detector `mask_rcnn_dat_nano`: its scenes, training and evaluation."""
