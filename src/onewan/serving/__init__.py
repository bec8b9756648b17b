"""What the page is served from: who may use it, its files, and what it tells of runs and clips.

All of it works without the screens, which are `onewan.web`. Never imports torch.
"""
