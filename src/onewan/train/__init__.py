"""Training: optimizers, trainable weights, the training step, its state, and the loop around it."""
