"""The sweep over every text model type of transformers."""
