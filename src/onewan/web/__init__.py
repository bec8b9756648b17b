"""The page: set up, watch and steer runs from a browser (``onewan serve``).

It works on run folders alone, as the command line does: it reads them, leaves requests in them, and
starts ``python -m onewan`` for everything that computes. Trainers are processes of their own, which
outlive the page. Never imports torch.
"""
