"""The design's name of the trainer. OneTrainer has one training loop for all models, in which the
setup, the data loader, the sampler and the saver are those of the model."""

from modules.trainer.GenericTrainer import GenericTrainer

WanTrainer = GenericTrainer
"""An alias of `GenericTrainer`, with which Wan trains too."""
