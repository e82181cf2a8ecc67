"""The vocabulary that passes, backends and the front door share; imports nothing else of fxquant."""
