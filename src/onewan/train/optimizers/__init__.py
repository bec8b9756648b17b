"""Optimizers: built from the libraries by name, and driven one way whatever the library.

`builders` makes a library's optimizer from the run file's `optimizer` section. `library` hides what
differs between the libraries. `joint` and `per_weight` are the two ways of stepping: one optimizer
over all weights, and one optimizer for each weight. `trainable_optimizer` chooses between them.
"""
