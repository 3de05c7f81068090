"""Interactions as a LightningDataModule: histories to train on, cases to rank."""

import hashlib
import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from evolute.data.interaction_splits import Held, Log, Split, Ties, by_time, leave_one_out, make_log
from evolute.data.interaction_tables import ItemTexts, read_events, read_items
from evolute.data.item_vectors import ItemVectors, encode_items
from evolute.data.resumable import ResumablePlace
from evolute.data.samplers import ResumableLoader, ResumableSampler
from evolute.geometry import Histories, cooccurrence_graph


class InteractionDataModule(ResumablePlace):
    """Interactions of users with items, split by time, with full-ranking validation and test.

    Items are numbered ``0 .. n_items - 1``; ``n_items`` itself pads. A training batch is a dict of ``user`` [b] and
    ``items`` [b, max_len + 1], a piece of one history each, padded on the right: position ``t`` predicts the next.
    Pieces overlap by one item, so that every event but a user's first is a target once an epoch. A validation, test or
    prediction batch has ``user`` [b], ``items`` [b, max_len] (the end of the history, padded on the right), ``length``
    [b], ``target`` [b] and ``seen`` [b, s] (all of the history, padded).

    Nothing held out is seen in training: histories and graph end before it, and vectors are made of texts alone.

    Example::

        data = InteractionDataModule("ml-100k", max_len=50)
        data.setup("fit")
        table = RecPCA(64).fit_transform(data.vectors.table, data.graph)

    Args:
        source: ``"ml-100k"`` (after ``evolute data ml-100k``), a file, a folder in RecBole's or MovieLens's layout, or
            a Hugging Face data set.
        user_column: column of users.
        item_column: column of items.
        time_column: column of times; None takes the order of the file.
        rating_column: column of ratings, for ``min_rating``.
        min_rating: drop events below.
        k_core: drop users and items with fewer events, until none is left; 1 keeps all.
        keep_duplicates: keep rows that repeat user, item and time of an earlier one.
        ties: order of a user's events of equal time, ``"file"`` or ``"item"``. It changes results: 415 of the 943 users
            of MovieLens-100K have one time on their last two events.
        split: ``"leave_one_out"``, the last event of each user for test and the one before for validation; ``"time"``,
            two cuts for all users.
        valid_fraction: share of events between the cuts of ``"time"``.
        test_fraction: share after them.
        max_len: events of a history that a model sees.
        batch_size: pieces of histories a step.
        eval_batch_size: users ranked at once.
        seed: of the order of training.
        vectors: where the item vectors come from (see :func:`encode_items`): ``"wordllama"``, ``"minilm"``, the name or
            folder of a model, or a .npy, .parquet or .safetensors file; None for none.
        items: table of items (csv, jsonl, parquet) for texts, where the source has none of its own.
        text_column: its column of texts.
        title_column: of titles, for the report and what is served; None takes the beginning of the text.
        genre_column: of genres, for the map in the report.
        hold_out_items: share of items, drawn by ``seed``, whose events leave the training histories: cold items.
        window: of the co-occurrence graph; None for whole histories.
        neighbours: neighbours an item in the graph.

    Attributes:
        log: all events (after ``setup``).
        texts: titles, texts and genres by item name.

    Raises:
        ValueError: if an argument is out of range, or (in ``setup``) the data does not serve.
    """

    def __init__(
        self,
        source: str = "ml-100k",
        user_column: str = "user_id",
        item_column: str = "item_id",
        time_column: str | None = "timestamp",
        rating_column: str | None = None,
        min_rating: float | None = None,
        k_core: int = 1,
        keep_duplicates: bool = False,
        ties: Ties = "file",
        split: Split = "leave_one_out",
        valid_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_len: int = 50,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        seed: int = 0,
        vectors: str | None = None,
        items: str | None = None,
        text_column: str | None = None,
        title_column: str | None = None,
        genre_column: str | None = None,
        hold_out_items: float = 0.0,
        window: int | None = 5,
        neighbours: int | None = 50,
    ) -> None:
        super().__init__()
        for name, value in (("max_len", max_len), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size),
                            ("k_core", k_core), ("window", 1 if window is None else window),
                            ("neighbours", 1 if neighbours is None else neighbours)):  # fmt: skip
            if value < 1:
                raise ValueError(f"InteractionDataModule({name}={value}): must be at least 1")
        for name, value, known in (("ties", ties, ("file", "item")), ("split", split, ("leave_one_out", "time"))):
            if value not in known:
                raise ValueError(f"InteractionDataModule({name}={value!r}): must be one of {known}")
        if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
            raise ValueError(f"InteractionDataModule(valid_fraction={valid_fraction}, test_fraction={test_fraction}): "
                             "both must be positive and leave something to train on")  # fmt: skip
        if not 0 <= hold_out_items < 1:
            raise ValueError(f"InteractionDataModule(hold_out_items={hold_out_items}): must lie in [0, 1)")
        if split == "time" and time_column is None:
            raise ValueError("InteractionDataModule(split='time', time_column=None): a cut in time needs times")
        if min_rating is not None and rating_column is None:
            raise ValueError(f"InteractionDataModule(min_rating={min_rating}): name the rating_column")
        self.save_hyperparameters()
        self.arguments = SimpleNamespace(**self.hparams)
        self.batch_size, self.max_len, self.seed = batch_size, max_len, seed
        self.log: Log | None = None
        self.texts = ItemTexts({}, {}, {})

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.log is not None:
            return
        a = self.arguments
        events = read_events(a.source, a.user_column, a.item_column, a.time_column, a.rating_column)
        log = make_log(events, a.ties, a.min_rating, a.k_core, a.keep_duplicates)
        if a.split == "leave_one_out":
            train, valid, test = leave_one_out(log)
        else:
            train, valid, test = by_time(log, a.valid_fraction, a.test_fraction)
        self.texts = read_items(a.items or a.source, a.text_column, a.item_column, a.title_column, a.genre_column)
        self._train_ends, self._held = train, {"valid": valid, "test": test}
        self.cold = self._cold(len(log.item_names))
        self.log = log
        pieces = Pieces(self.train_histories, a.max_len, self.n_items)
        users = len(log.user_names)
        if not len(valid.users) or not len(pieces):
            why = (
                "an event between two others" if a.split == "leave_one_out" else "events on both sides of the first cut"
            )
            why = f"has {why}" if not len(valid.users) else "has two events left to train on"
            raise ValueError(
                f"{events.place}: {len(log.items)} interactions of {users} users are too few to split by "
                f"{a.split!r}: no user {why}"
            )
        self._pieces = pieces
        few = users - len(valid.users)
        rank_zero_info(
            f"interactions {a.source}: {len(log.items):,} of {users:,} users with {self.n_items:,} items"
            + "".join(f"; {note}" for note in log.notes)
            + f"; equal times in order of {a.ties}; split {a.split}"
            + (f" ({few:,} users have nothing to be validated on and train only)" if few else "")
        )

    def _cold(self, n_items: int) -> np.ndarray[Any, Any]:
        cold = np.zeros(n_items, bool)
        count = int(self.arguments.hold_out_items * n_items)
        cold[np.random.default_rng(self.seed).permutation(n_items)[:count]] = True
        return cold

    @property
    def n_items(self) -> int:
        """Number of items; also the index that pads."""
        return len(self._log.item_names)

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self._log.user_names)

    @cached_property
    def train_histories(self) -> Histories:
        """What may be trained on: every user's events before the first one held out, without cold items."""
        log = self._log
        owner = np.repeat(np.arange(len(log.user_names)), np.diff(log.offsets))
        keep = (np.arange(len(log.items)) < self._train_ends[owner]) & ~self.cold[log.items]
        lengths = np.bincount(owner[keep], minlength=len(log.user_names))
        return Histories(log.items[keep], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @cached_property
    def graph(self) -> Any:
        """The co-occurrence graph of the training histories, scipy CSR [n_items, n_items]."""
        return cooccurrence_graph(self.train_histories, self.n_items, self.arguments.window, self.arguments.neighbours)

    @cached_property
    def train_counts(self) -> np.ndarray[Any, Any]:
        """Training events of each item, [n_items]."""
        return np.bincount(self.train_histories.items, minlength=self.n_items)

    @cached_property
    def vectors(self) -> ItemVectors:
        """Text vectors in the order of the items, matched by name; items without text have the mean vector.

        Raises:
            ValueError: if ``vectors`` is not set, or a file does not cover the items.
        """
        if self.arguments.vectors is None:
            raise ValueError("this needs item vectors: set data.init_args.vectors, to wordllama or minilm for example")
        found = encode_items(self.arguments.vectors, self._log.item_names, self.texts.text)
        rank_zero_info(
            f"item vectors {self.arguments.vectors}: {tuple(found.table.shape)}, {found.missing} items without text "
            "have the mean vector"
        )
        return found

    @cached_property
    def item_titles(self) -> list[str]:
        """Titles in the order of the items; the name where there is none."""
        return [self.texts.title.get(name) or name for name in self._log.item_names]

    @cached_property
    def item_genres(self) -> list[str]:
        """First genres in the order of the items."""
        return [self.texts.genre.get(name, "unknown") for name in self._log.item_names]

    @property
    def item_names(self) -> list[str]:
        """Names as in the source, in the order of the items."""
        return self._log.item_names

    @property
    def user_names(self) -> list[str]:
        """Names as in the source, in the order of the users."""
        return self._log.user_names

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self._world
        sampler = ResumableSampler(len(self._pieces), self.seed, world, rank)
        loader = ResumableLoader(
            self._pieces,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(self._pieces) // world > self.batch_size,
            collate_fn=_as_is,
            generator=Generator().manual_seed(self.seed),
        )
        loader.position = self._position
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._ranking(self._held["valid"])

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._ranking(self._held["test"])

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        log = self._log
        users = np.arange(len(log.user_names))
        return self._ranking(Held(users, log.offsets[1:], np.full(len(users), self.n_items)))

    def _ranking(self, held: Held) -> DataLoader[Any]:
        cases = Cases(self._log, held, self.max_len, self.n_items)
        rank, world = self._world
        return DataLoader(
            cases,
            batch_size=self.arguments.eval_batch_size, sampler=Strided(cases, world, rank), collate_fn=_as_is,
            generator=Generator().manual_seed(self.seed),
        )  # fmt: skip

    @override
    def _identity(self) -> dict[str, Any]:
        histories = self.train_histories
        digest = hashlib.sha256(histories.items.tobytes() + histories.offsets.tobytes()).hexdigest()
        sizes = {"samples a batch": self.batch_size * self._world[1], "max_len": self.max_len, "seed": self.seed}
        return {"training events sha256": digest, **sizes}

    @property
    def _log(self) -> Log:
        if self.log is None:
            raise RuntimeError("InteractionDataModule: call setup() first (a Trainer does)")
        return self.log


class Pieces(Dataset[Any]):
    """Pieces of histories, each ``length + 1`` items long at most, padded on the right."""

    def __init__(self, histories: Histories, length: int, padding: int) -> None:
        self.histories, self.length, self.padding = histories, length, padding
        sizes = np.diff(histories.offsets)
        count = np.maximum(-(-(sizes - 1) // length), 0)  # one piece a `length` targets, cut from the end
        self.users = np.repeat(np.arange(len(sizes)), count)
        nth = np.arange(len(self.users)) - np.repeat(np.cumsum(count) - count, count)
        self.ends = histories.offsets[1:][self.users] - nth * length
        self.starts = np.maximum(self.ends - length - 1, histories.offsets[:-1][self.users])

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch."""
        items = _padded(self.histories.items, self.starts[indices], self.ends[indices], self.length + 1, self.padding)
        return {"user": torch.from_numpy(self.users[indices]), "items": items}


class Cases(Dataset[Any]):
    """Histories and the item that follows each."""

    def __init__(self, log: Log, held: Held, length: int, padding: int) -> None:
        self.log, self.held, self.length, self.padding = log, held, length, padding

    def __len__(self) -> int:
        return len(self.held.users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch."""
        users, ends = self.held.users[indices], self.held.ends[indices]
        begins = self.log.offsets[users]
        starts = np.maximum(ends - self.length, begins)
        longest = max(1, int((ends - begins).max()))
        return {
            "user": torch.from_numpy(users),
            "items": _padded(self.log.items, starts, ends, self.length, self.padding),
            "length": torch.from_numpy(ends - starts),
            "target": torch.from_numpy(self.held.targets[indices]),
            "seen": _padded(self.log.items, begins, ends, longest, self.padding),
        }


def _padded(items: Any, starts: Any, ends: Any, width: int, padding: int) -> Tensor:
    at = starts[:, None] + np.arange(width)
    inside = at < ends[:, None]
    taken = items[np.minimum(at, len(items) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(inside, taken, padding))


class Strided(DistributedSampler[Any]):
    """Every so many-th case for each rank, none twice."""

    @override
    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(range(len(cast(Any, self.dataset))), self.rank, None, self.num_replicas)

    @override
    def __len__(self) -> int:
        return math.ceil((len(cast(Any, self.dataset)) - self.rank) / self.num_replicas)


def _as_is(batch: Any) -> Any:
    return batch
