"""Hessian and Gauss-Newton operators, and what is estimated from their products."""
