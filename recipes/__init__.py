"""Training recipes: one LightningModule a file."""
