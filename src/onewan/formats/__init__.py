"""Files of weights and adapters: what they hold, under which keys, and how values are stored.

Hides containers (safetensors, GGUF, pickle, shards), key formats, prefixes and quantization.
Callers see components with the keys of diffusers and transformers, and adapters as values by
module.
Identifying a file needs no torch.
"""
