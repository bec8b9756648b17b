"""The processes that train one run together: who does what, and how they agree.

torchrun starts them and torch.distributed carries what they send; neither is imported in a run of
one process.
"""
