"""Captions of clips by a vision model: which clips have none, what the model is asked, its answers.

The model runs in another program, which has OpenAI's chat-completions interface. Only `server`
opens connections, and only `onewan caption` uses this package.
"""
