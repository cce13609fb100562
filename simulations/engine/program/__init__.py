"""Local training of K clients at once, without autograd where it matters: a model is compiled to steps with their own
backward passes, over stacked parameters (K, ...).

A value of the program has the shape that it has in the model, with K clients' batches one after the other as its first
dimension: (K * B, ...). ``compiler`` turns a module into steps, ``layers`` and ``recurrent`` hold parameters, ``steps`` do
not, ``rules`` are the optimisers.
"""
