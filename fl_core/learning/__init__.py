"""Application, the sequential local update (the oracle), partition, seeding, normalisation layers.

``application``, ``examples``, ``partition`` and ``seeding`` are torch-free; the rest of this package needs torch.
"""
