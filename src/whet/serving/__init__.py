"""`whet serve`: an OpenAI-compatible server around one batch that requests join and leave.

transformers has a server too; it knows no API key, no limits, no log-probabilities and no `n`.
"""
