"""The encoder that a recipe names."""

from typing import Any, Literal

from torch import nn

from evolute.models.recommender import GRU4Rec, LightGCN, MatrixFactorization, SASRec
from evolute.models.recommender.encoders import BERT4Rec

EncoderName = Literal["gru4rec", "sasrec", "bert4rec", "mf", "lightgcn"]
ENCODERS: tuple[EncoderName, ...] = ("gru4rec", "sasrec", "bert4rec", "mf", "lightgcn")


def build_encoder(name: EncoderName, dim: int, n_users: int, data: Any, arguments: dict[str, Any]) -> nn.Module:
    """Return the encoder, sized for the data.

    Raises:
        ValueError: if an argument is not one of its class.
    """
    length = {} if data is None else {"max_len": data.max_len}
    try:
        match name:
            case "gru4rec":
                return GRU4Rec(dim, **arguments)
            case "sasrec":
                return SASRec(dim, **{**length, **arguments})
            case "bert4rec":
                return BERT4Rec(dim, **{**length, **arguments})
            case "mf":
                return MatrixFactorization(n_users, dim, **arguments)
            case "lightgcn":
                if data is None:
                    raise ValueError("Recommend(encoder='lightgcn'): its graph is made of the data's histories")
                return LightGCN(data.train_histories, data.n_items, dim, **arguments)
    except TypeError as error:
        raise ValueError(f"Recommend(encoder={name!r}, encoder_args={arguments}): {error}") from error
