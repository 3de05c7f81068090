"""From a table of events to histories: filters, order, and what is held out."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evolute.data.interaction_tables import Events

Ties = Literal["file", "item"]
Split = Literal["leave_one_out", "time"]


class Log(NamedTuple):
    """Events with users and items as numbers, user by user, in the order of time.

    Attributes:
        items: item indices, [events].
        offsets: user ``u`` has ``items[offsets[u]:offsets[u + 1]]``, [users + 1].
        times: [events].
        user_names: [users].
        item_names: [items], in the order of the indices: by number where all names are numbers, else by text.
        notes: what was dropped, in words.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    times: NDArray[np.float64]
    user_names: list[str]
    item_names: list[str]
    notes: list[str]


class Held(NamedTuple):
    """One part of the data to rank on.

    Attributes:
        users: [cases].
        ends: a case's history is the user's events before this place in the log, [cases].
        targets: the item to find, [cases].
    """

    users: NDArray[np.int64]
    ends: NDArray[np.int64]
    targets: NDArray[np.int64]


def make_log(events: Events, ties: Ties, min_rating: float | None, k_core: int, duplicates: bool) -> Log:
    """Filter and order events.

    Args:
        events: as read.
        ties: order of a user's events of equal time: that of the file, or of item indices.
        min_rating: events below are dropped.
        k_core: users and items with fewer events are dropped, until none is left.
        duplicates: keep rows that repeat an earlier one (same user, item and time).

    Raises:
        ValueError: if nothing is left.
    """
    notes: list[str] = []
    keep = np.ones(len(events.users), bool)
    if min_rating is not None and events.ratings is not None:
        keep = events.ratings >= min_rating
        notes.append(f"{int((~keep).sum())} rows below rating {min_rating:g} dropped")
    user_names, users = np.unique(events.users[keep], return_inverse=True)
    item_names, items = np.unique(events.items[keep], return_inverse=True)
    times = np.arange(keep.sum(), dtype=np.float64) if events.times is None else events.times[keep]
    if not duplicates and events.times is not None:
        rows = np.rec.fromarrays([users, items, times])
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True
        if not first.all():
            notes.append(f"{int((~first).sum())} duplicate rows dropped")
        users, items, times = users[first], items[first], times[first]
    core = _core(users, items, k_core)
    if k_core > 1:
        notes.append(f"{int((~core).sum())} rows outside the {k_core}-core dropped")
    if not core.any():
        raise ValueError(f"{events.place}: no interaction is left ({'; '.join(notes) or 'it was empty'})")
    user_names, users = _renumber(user_names, users[core])
    item_names, items = _renumber(item_names, items[core])
    times = times[core]
    order = np.lexsort((items, times, users) if ties == "item" else (times, users))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(user_names)))]).astype(np.int64)
    return Log(items[order].astype(np.int32), offsets, times[order], user_names, item_names, notes)


def _renumber(names: Any, codes: Any) -> tuple[list[str], NDArray[np.int64]]:
    """Drop names that are not used; order by number where all are numbers."""
    used, codes = np.unique(codes, return_inverse=True)
    names = names[used]
    if all(n.isdecimal() for n in names.tolist()):
        rank = np.argsort(names.astype(np.int64), kind="stable")
        place = np.empty(len(rank), np.int64)
        place[rank] = np.arange(len(rank))
        return names[rank].tolist(), place[codes]
    return names.tolist(), codes


def _core(users: Any, items: Any, k: int) -> NDArray[np.bool_]:
    keep = np.ones(len(users), bool)
    while True:
        few = (np.bincount(users[keep], minlength=users.max(initial=0) + 1) < k)[users]
        few |= (np.bincount(items[keep], minlength=items.max(initial=0) + 1) < k)[items]
        if not (few & keep).any():
            return keep
        keep &= ~few


def leave_one_out(log: Log) -> tuple[NDArray[np.int64], Held, Held]:
    """Hold out each user's last event for testing and the one before for validation.

    Users with fewer than three events keep all of them for training.

    Returns:
        The ends of the training histories [users], validation, test.
    """
    starts, ends = log.offsets[:-1], log.offsets[1:]
    users = np.flatnonzero(ends - starts >= 3)
    train = ends.copy()
    train[users] -= 2
    return train, _held(log, users, ends[users] - 2), _held(log, users, ends[users] - 1)


def by_time(log: Log, valid: float, test: float) -> tuple[NDArray[np.int64], Held, Held]:
    """Cut at two moments for all users; the first event after a cut is to be found from all events before it.

    Args:
        log: the events.
        valid: share of all events between the cuts.
        test: share after the second.

    Returns:
        The ends of the training histories [users], validation, test.
    """
    first, second = np.quantile(log.times, [1 - valid - test, 1 - test])
    owner = np.repeat(np.arange(len(log.offsets) - 1), np.diff(log.offsets))
    before = [
        log.offsets[:-1] + np.bincount(owner[log.times < t], minlength=len(log.offsets) - 1) for t in (first, second)
    ]
    starts, ends = log.offsets[:-1], log.offsets[1:]
    valid_users = np.flatnonzero((before[0] > starts) & (before[0] < before[1]))
    test_users = np.flatnonzero((before[1] > starts) & (before[1] < ends))
    return before[0], _held(log, valid_users, before[0][valid_users]), _held(log, test_users, before[1][test_users])


def _held(log: Log, users: Any, ends: Any) -> Held:
    return Held(users.astype(np.int64), ends.astype(np.int64), log.items[ends].astype(np.int64))
