"""Interactions: what is read, in which order, and what is held out of training."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from evolute.data import InteractionDataModule, encode_items
from evolute.data import item_vectors as vectors_module
from evolute.data.interaction_splits import make_log
from evolute.data.interaction_tables import Events, read_events, read_items
from evolute.geometry import read_vectors, write_vectors


def rows(users=30, items=25, seed=0):
    """User, item and time, with a few equal times, in a shuffled order."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(users):
        times = np.sort(rng.integers(0, 40, rng.integers(4, 12)))
        found += [(f"u{user}", str(rng.integers(items)), int(t)) for t in times]
    rng.shuffle(found)
    return found


def write_csv(path, table, header="user_id,item_id,timestamp"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in table)]) + "\n")
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_csv(tmp_path / "log.csv", rows())


def module(source, **kwargs):
    made = InteractionDataModule(source, **{"max_len": 4, "batch_size": 8, **kwargs})
    made.setup("fit")
    return made


def histories_of(table, ties="file"):
    """The histories, by hand: user -> items in the order of time."""
    found = {}
    for place, (user, item, time) in enumerate(table):
        found.setdefault(user, []).append((time, place if ties == "file" else int(item), item))
    return {user: [item for *_, item in sorted(events)] for user, events in found.items()}


def unique(table):
    return list(dict.fromkeys(table))


@pytest.mark.parametrize("ties", ["file", "item"])
def test_leave_one_out_holds_out_the_last_two(source, ties):
    data = module(source, ties=ties)
    expected = histories_of(unique(rows()), ties)
    names = data.item_names
    assert names == sorted(names, key=int)
    for stage, back in (("val", 2), ("test", 1)):
        for batch in getattr(data, f"{stage}_dataloader")():
            for user, target, seen, items, length in zip(
                *(batch[k] for k in ("user", "target", "seen", "items", "length")), strict=True
            ):
                whole = expected[data.user_names[user]]
                assert names[target] == whole[-back]
                assert [names[i] for i in seen if i < data.n_items] == whole[:-back]
                assert [names[i] for i in items[:length]] == whole[:-back][-4:]
                assert (items[length:] == data.n_items).all()


def test_every_training_event_but_the_first_of_a_history_is_a_target_once(source):
    data = module(source)
    pairs = []
    for batch in data.train_dataloader():
        for user, items in zip(batch["user"], batch["items"], strict=True):
            real = items[items < data.n_items].tolist()
            pairs += [(int(user), a, b) for a, b in itertools.pairwise(real)]
    h = data.train_histories
    expected = []
    for user in range(data.n_users):
        whole = h.items[h.offsets[user] : h.offsets[user + 1]].tolist()
        expected += [(user, a, b) for a, b in itertools.pairwise(whole)]
    assert len(data.train_dataloader().dataset) // 8 * 8 >= 8
    assert set(pairs) <= set(expected)
    data.batch_size = 10**6  # one batch of all pieces
    (batch,) = data.train_dataloader()
    assert int((batch["items"][:, 1:] < data.n_items).sum()) == len(expected)


def test_what_is_held_out_changes_nothing_in_training(tmp_path):
    table = unique(rows())
    last = {}
    for user, items in histories_of(table).items():
        last[user] = items[-2:]
    data = module(write_csv(tmp_path / "a.csv", table))
    # The last two events of every user name other items that exist; their times stay.
    by_time = {}
    for place, (user, _, time) in enumerate(table):
        by_time.setdefault(user, []).append((time, place))
    changed = list(table)
    for places in by_time.values():
        for time, place in sorted(places)[-2:]:
            changed[place] = (table[place][0], str((int(table[place][1]) + 1) % 25), time)
    other = module(write_csv(tmp_path / "b.csv", changed), keep_duplicates=True)
    assert data.item_names == other.item_names
    np.testing.assert_array_equal(data.train_histories.items, other.train_histories.items)
    assert (data.graph != other.graph).nnz == 0


def test_split_by_time_cuts_all_users_at_two_moments(source):
    data = module(source, split="time", valid_fraction=0.2, test_fraction=0.2)
    log = data.log
    first, second = np.quantile(log.times, [0.6, 0.8])
    held = data._held
    owner = np.repeat(np.arange(data.n_users), np.diff(log.offsets))
    trained = np.arange(len(log.items)) < data._train_ends[owner]
    assert (log.times[trained] < first).all()
    assert (log.times[~trained] >= first).all()
    assert (log.times[held["valid"].ends] >= first).all()
    assert (log.times[held["valid"].ends] < second).all()
    assert (log.times[held["test"].ends] >= second).all()
    assert (log.times[held["test"].ends - 1] < second).all()


def test_k_core_ratings_and_duplicates():
    events = Events(
        np.array(["a", "a", "b", "b", "c", "a"]), np.array(["1", "2", "1", "2", "3", "1"]),
        np.array([1.0, 2, 3, 4, 5, 1]), np.array([5.0, 5, 5, 1, 5, 5]), "here",
    )  # fmt: skip
    log = make_log(events, "file", None, 2, False)
    assert (log.user_names, log.item_names, log.items.tolist()) == (["a", "b"], ["1", "2"], [0, 1, 0, 1])
    assert log.notes == ["1 duplicate rows dropped", "1 rows outside the 2-core dropped"]
    assert len(make_log(events, "file", None, 1, True).items) == 6
    assert "1 rows below rating 3 dropped" in make_log(events, "file", 3, 1, True).notes
    with pytest.raises(ValueError, match="no interaction is left"):
        make_log(events, "file", None, 9, False)


@pytest.mark.parametrize(
    "form", ["csv", "tsv", "jsonl", "parquet", "inter", "u.data", "ratings.dat", "ratings.csv", "dataset"]
)
def test_every_kind_of_file_gives_the_same_log(tmp_path, form):
    table = [(u[1:], i, t) for u, i, t in unique(rows())]
    columns = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*table, strict=True)), strict=True))
    path = tmp_path / (form if "." in form else f"log.{form}")
    rated = [(u, i, 3, t) for u, i, t in table]
    match form:
        case "csv":
            write_csv(path, table)
        case "tsv" | "inter":
            types = (
                "user_id:token\titem_id:token\ttimestamp:float" if form == "inter" else "user_id\titem_id\ttimestamp"
            )
            path.write_text("\n".join([types, *("\t".join(map(str, r)) for r in table)]))
        case "jsonl":
            path.write_text("\n".join(json.dumps(dict(zip(columns, r, strict=True))) for r in table))
        case "parquet":
            parquet.write_table(pa.table(columns), path)
        case "u.data":
            path.write_text("\n".join("\t".join(map(str, r)) for r in rated))
        case "ratings.dat":
            path.write_text("\n".join("::".join(map(str, r)) for r in rated))
        case "ratings.csv":
            write_csv(path, rated, "userId,movieId,rating,timestamp")
        case _:
            import datasets

            datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
            path = tmp_path / "set"
    where = path.parent if form in ("inter", "u.data", "ratings.dat", "ratings.csv") else path
    found = read_events(str(where))
    assert [(u, i, int(t)) for u, i, t in zip(found.users, found.items, found.times, strict=True)] == table


def test_movielens_items_have_titles_years_and_genres(tmp_path):
    flags = "|".join("1" if g in (1, 5) else "0" for g in range(19))
    (tmp_path / "u.item").write_text(f"7|Twelve Monkeys (1995)|01-Jan-1995||url|{flags}\n", "latin-1")
    (tmp_path / "u.data").write_text("1\t7\t5\t3\n")
    found = read_items(str(tmp_path))
    assert found.text["7"] == "Twelve Monkeys (1995). Genres: Action Comedy"
    assert found.genre["7"] == "Action"
    (tmp_path / "u.item").unlink()
    (tmp_path / "movies.dat").write_text("7::Twelve Monkeys (1995)::Sci-Fi|Drama\n")
    assert read_items(str(tmp_path)).text["7"] == "Twelve Monkeys (1995). Genres: Sci-Fi Drama"


def test_a_table_of_items_brings_texts_titles_and_genres(source, tmp_path):
    rows = ["item_id,about,name,kind", '3,"A long\nstory",Story,War Drama', "4,,Other,", "3,,,"]
    (tmp_path / "items.csv").write_text("\n".join(rows).replace("\\n", " ") + "\n")
    table = str(tmp_path / "items.csv")
    found = read_items(table, "about", title="name", genre="kind")
    assert (found.title, found.genre) == ({"3": "Story", "4": "Other"}, {"3": "War"})
    assert set(found.text) == {"3"}
    assert read_items(table, "about").title["3"].startswith("A long")
    data = module(source, items=table, text_column="about", title_column="name", genre_column="kind")
    place = data.item_names.index("3")
    assert (data.item_titles[place], data.item_genres[place]) == ("Story", "War")
    assert data.item_titles[data.item_names.index("5")] == "5"
    (tmp_path / "items.csv").write_text("item_id,about\n3,One\n4,Two\n3,Three\n")
    with pytest.raises(ValueError, match="item '3' has another 'about' in row 3"):
        read_items(table, "about")


BAD = {
    "a missing column": ("user,item_id,timestamp\na,1,2", {}, "no column 'user_id'"),
    "a missing time": (
        "user_id,item_id,timestamp\na,1,2\na,2,",
        {},
        "in 1 of 2 rows, first in row 2.*time_column: null",
    ),
    "no times at all": ("user_id,item_id\na,1", {}, "no column 'timestamp'"),
    "a time in words": ("user_id,item_id,timestamp\na,1,noon", {}, "numbers are needed"),
    "a missing user": ("user_id,item_id,timestamp\n,1,2", {}, "'user_id' has no value"),
    "nothing": ("user_id,item_id,timestamp\n", {}, "holds no interactions"),
    "too few events": ("user_id,item_id,timestamp\na,1,1\na,2,2\nb,1,3", {}, "too few to split"),
    "nothing left to train on": (
        "user_id,item_id,timestamp\n" + "\n".join(f"{u},{i},{i}" for u in "ab" for i in range(3)),
        {},
        "no user has two events left to train on",
    ),
    "a missing time by another name": ("user_id,item_id,at\na,1,", {"time_column": "at"}, "time_column: null takes"),
    "a core of nothing": ("user_id,item_id,timestamp\na,1,1\na,2,2", {"k_core": 5}, "no interaction is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    text, arguments, message = BAD[name]
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        module(str(path), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_len": 0},
        {"batch_size": 0},
        {"window": 0},
        {"neighbours": 0},
        {"ties": "random"},
        {"split": "half"},
        {"valid_fraction": 0.9, "test_fraction": 0.2},
        {"hold_out_items": 1.0},
        {"min_rating": 3.0},
        {"split": "time", "time_column": None},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        InteractionDataModule(**bad)
    with pytest.raises(FileNotFoundError, match="no such file"):
        module("./nowhere.csv")


def test_without_times_the_order_of_the_file_is_that_of_time(tmp_path):
    data = module(write_csv(tmp_path / "x.csv", rows()), time_column=None)
    expected = histories_of([(u, i, 0) for u, i, _ in rows()])
    batch = next(iter(data.test_dataloader()))
    assert data.item_names[batch["target"][0]] == expected[data.user_names[batch["user"][0]]][-1]


def test_users_with_few_events_train_only(tmp_path):
    data = module(write_csv(tmp_path / "x.csv", [*rows(), ("short", "3", 1), ("short", "4", 2)]))
    short = data.user_names.index("short")
    assert short not in {int(u) for batch in data.test_dataloader() for u in batch["user"]}
    h = data.train_histories
    assert h.offsets[short + 1] - h.offsets[short] == 2
    assert short in {int(u) for batch in data.predict_dataloader() for u in batch["user"]}


def test_cold_items_leave_training_but_can_be_targets(source):
    data = module(source, hold_out_items=0.3)
    assert data.cold.sum() == int(0.3 * data.n_items)
    assert not data.cold[data.train_histories.items].any()
    targets = torch.cat([batch["target"] for batch in data.test_dataloader()])
    assert data.cold[targets].any()


def test_vectors_are_matched_by_name_and_missing_text_gets_the_mean(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLUTE_CACHE", str(tmp_path))
    calls = []

    def load(source):
        def encode(texts):
            calls.append(len(texts))
            return np.array([[len(t), t.count("a")] for t in texts], np.float32)

        return encode

    monkeypatch.setattr(vectors_module, "load_encoder", load)
    texts = {"x": "aa", "y": "bbbb", "z": " "}
    found = encode_items("stub", ["z", "y", "x"], texts)
    assert found.table.tolist() == [[3.0, 1.0], [4.0, 0.0], [2.0, 2.0]]
    assert found.missing == 1
    encode_items("stub", ["x", "y", "z"], texts)
    assert calls == [2, 2]  # another order of texts is another file; the same order is read back
    encode_items("stub", ["z", "y", "x"], texts)
    assert calls == [2, 2]
    with pytest.raises(ValueError, match="no item has a text"):
        encode_items("stub", ["z"], texts)


def test_encoding_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    encoded = []

    def load(source):
        def encode(texts):
            if len(encoded) == 4:
                encoded.append("interrupted")
                raise KeyboardInterrupt
            encoded.extend(texts)
            return np.ones((len(texts), 2)) * len(encoded)

        return encode

    monkeypatch.setattr(vectors_module, "load_encoder", load)
    texts = [f"text {i}" for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        vectors_module.encode_texts("stub", texts, tmp_path, chunk=2)
    assert len(vectors_module.encode_texts("stub", texts, tmp_path, chunk=2)) == 6
    assert [e for e in encoded if e != "interrupted"] == texts
    monkeypatch.setattr(vectors_module, "load_encoder", lambda s: lambda t: np.full((len(t), 2), np.nan))
    with pytest.raises(ValueError, match="NaN or inf for the text 'text 0'"):
        vectors_module.encode_texts("other", texts, tmp_path)


def test_files_of_vectors(tmp_path):
    names, table = ["b", "a", "c"], np.arange(6, dtype=np.float32).reshape(3, 2)
    write_vectors(tmp_path / "v.parquet", names, table)
    np.save(tmp_path / "v.npy", table)
    (tmp_path / "v.npy.ids").write_text("\n".join(names) + "\n")
    from safetensors.numpy import save_file

    save_file({"vectors": table}, tmp_path / "v.safetensors", {"item_ids": json.dumps(names)})
    for suffix in ("parquet", "npy", "safetensors"):
        found = encode_items(str(tmp_path / f"v.{suffix}"), ["a", "b"], {})
        assert found.table.tolist() == [[2.0, 3.0], [0.0, 1.0]]
    with pytest.raises(ValueError, match=r"no vector of item 'd' \(1 of 2 missing\)"):
        encode_items(str(tmp_path / "v.parquet"), ["a", "d"], {})
    (tmp_path / "v.npy.ids").write_text("a\nb")
    with pytest.raises(ValueError, match="2 names and vectors of shape"):
        read_vectors(tmp_path / "v.npy")
    table[1, 0] = np.nan
    write_vectors(tmp_path / "v.parquet", names, table)
    with pytest.raises(ValueError, match="item 'a' holds NaN"):
        read_vectors(tmp_path / "v.parquet")
    write_vectors(tmp_path / "v.parquet", ["a", "a", "c"], table)
    with pytest.raises(ValueError, match="'a' comes twice"):
        read_vectors(tmp_path / "v.parquet")
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / "w.npy")


def test_a_transformer_by_folder_gives_the_mean_of_its_hidden_states(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    encode = vectors_module.load_encoder(str(tmp_path))
    found = encode(["red film", "blue"])
    with torch.no_grad():
        alone = model(**tokenizer("blue", return_tensors="pt")).last_hidden_state.mean(1)
    np.testing.assert_allclose(found[1], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match="no such encoder"):
        vectors_module.load_encoder(str(tmp_path / "nothing"))
