"""Data: from folders of videos, images and captions to the batches of each training step.

`index` finds the clips (`clip`; `spans` of a video), with their captions (`captions`) and masks
(`masks`), and reports every unusable file (`report`); `contact_sheet` shows them. `augmented` adds
variants (`augment`). `dataset.prepare` encodes what is missing and splits off the validation clips
(`validation_split`). Encoded tensors come from the cache on disk (`cached_latents`, `cache`) or are
computed at each use (`encode`). `loader` makes batches of them. Never draws timesteps or noise.
"""
