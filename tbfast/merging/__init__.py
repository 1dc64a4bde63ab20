"""Merging of fine-tuned models, tensor by tensor, from files to files. Does not import torch."""
