"""`from SOTA_SSL_Models import SimSiam; model = SimSiam(args)`: the name under which the first README offers it."""

from model.simsiam import SimSiam

__all__ = ['SimSiam']
