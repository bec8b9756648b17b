"""Which modules of a model lie on the device, and how they get there."""
