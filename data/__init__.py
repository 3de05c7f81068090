"""LightningDataModules, the sources behind them, and samplers that remember where they were."""
