"""Measure birdcall against its peers: each module is one ``birdcall benchmark`` command."""
