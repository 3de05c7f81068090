"""The one door to gradients, parameters, updates and optimizer state."""
