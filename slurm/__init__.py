"""The batch script of ``evolute launch``; ``local/`` has a cluster of one machine to try it on."""
