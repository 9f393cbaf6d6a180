"""One server of many processes: a supervisor, front ends that answer, workers that compute.

The supervisor (`supervisor`) starts the others, replaces those that die, and shows the metrics of
all. A front end (`front_end`) has both transports, the tasks and the decoders, and needs no torch.
A worker (`worker`) has one device with its engines and queues. Front ends and workers talk over
channels (`channel`) with `messages`; pixels and results lie in the `arena` of the front end; who
holds which place in a queue, and what state everybody is in, is on the `board`.
"""
