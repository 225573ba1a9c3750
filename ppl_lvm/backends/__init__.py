"""The two backends: the only files that import torch, Pyro, JAX or NumPyro."""
