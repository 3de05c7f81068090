"""Optimizers whose step is defined by a norm or a metric."""
