"""The mathematics: pure functions and small operators on tensors. Imports torch, never lightning."""
