"""Lightning callbacks: observe, call geometry, act, record."""
