"""Recommenders: one item table, an encoder of what the user did, losses and rankings over all items."""

from evolute.models.recommender.collaborative import LightGCN, MatrixFactorization
from evolute.models.recommender.encoders import BERT4Rec, GRU4Rec, SASRec
from evolute.models.recommender.items import AdaptedItems, ItemEmbedding, LookedUp, all_items
from evolute.models.recommender.losses import LOSSES, Loss, cross_entropy, item_loss
from evolute.models.recommender.ranking import ranking_metrics, target_ranks, top_items

__all__ = [
    "LOSSES",
    "AdaptedItems",
    "BERT4Rec",
    "GRU4Rec",
    "ItemEmbedding",
    "LightGCN",
    "LookedUp",
    "Loss",
    "MatrixFactorization",
    "SASRec",
    "all_items",
    "cross_entropy",
    "item_loss",
    "ranking_metrics",
    "target_ranks",
    "top_items",
]
