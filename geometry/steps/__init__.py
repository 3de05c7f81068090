"""How far a step may go, and how far it went."""
