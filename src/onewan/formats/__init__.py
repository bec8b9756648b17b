"""File formats of weights and adapters: containers, key formats, prefixes, quantization.

Hides all of these. Callers get components with the keys of diffusers and transformers, and adapters
as tensors by module. Identifying a file does not import torch.
"""
