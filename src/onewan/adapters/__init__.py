"""What is trained beside the frozen weights: which layers, and the adapters on them."""
