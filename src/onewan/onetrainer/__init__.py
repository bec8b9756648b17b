"""Wan 2.2 in OneTrainer: files that are added to a checkout, and the OneTrainer API they depend on.

`install` adds the files of `overlay/` to a checkout and removes them again; `contract` checks a
checkout for every name that they use. At run time they call `patches`, so that OneTrainer knows the
model type, and the other modules here, which convert its configs, batches and files to onewan's.
Only the overlay, and `patches` when they are applied, import OneTrainer.
"""
