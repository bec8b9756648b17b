"""Wan 2.2 in OneTrainer: files that are laid into a checkout, and what they stand on.

`install` lays `overlay/` into a checkout and takes it out again; `contract` knows what of
OneTrainer the overlay uses, and checks a checkout for it. At run time the laid-in files call
`bootstrap`, which makes OneTrainer know the model type, and the other modules here, which put its
configs, batches and files into onewan's terms. `importing` goes the other way: a OneTrainer config
becomes a run file. Nothing here imports OneTrainer but `bootstrap.extend`, when it is called.
"""
