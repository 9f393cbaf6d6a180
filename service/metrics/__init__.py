"""Every Prometheus instrument of the server: of requests, of models, and of the whole replica.

Names, labels and buckets follow one rule: an application prefix, base units, bounded labels,
and every label combination present from the start. Images are counted, not requests, wherever
the queue or the device is meant. Children are bound once, so that counting costs no look-up by
label.
"""
