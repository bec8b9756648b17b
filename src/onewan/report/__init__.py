"""Pages about runs: what one run did (`page`), and several beside each other (`comparison`).

Reads run folders alone, of running, ended and damaged runs, and needs no torch.
"""
