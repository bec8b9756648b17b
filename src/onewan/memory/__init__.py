"""Which modules of a model are on the device, and how they are moved there."""
