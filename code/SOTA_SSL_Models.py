"""Public import of the model: `from SOTA_SSL_Models import SimSiam; model = SimSiam(args)`."""

from model.simsiam import SimSiam

__all__ = ['SimSiam']
