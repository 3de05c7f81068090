"""Split, packing and the bigram floor, each against a brute-force twin."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from evolute.data import PackedWindows, bigram_floor, split_documents


def test_every_token_is_the_target_of_one_window():
    stream = np.arange(50, dtype=np.int32)
    windows = PackedWindows(stream, context=7, pad_to=1)
    targets = [t for i in range(len(windows)) for t in windows[i]["labels"][1:].tolist() if t != -100]
    assert targets == list(range(1, 50))
    assert windows.targets == 49
    for window in (windows[i] for i in range(len(windows))):
        seen = window["labels"] != -100
        assert torch.equal(window["labels"][seen], window["input_ids"][seen])


def test_training_windows_drop_the_tail_and_overlap_by_one():
    windows = PackedWindows(np.arange(50, dtype=np.int32), context=7)
    assert len(windows) == 7
    assert [windows[i]["input_ids"].tolist() for i in (0, 6)] == [list(range(8)), list(range(42, 50))]
    assert len(PackedWindows(np.arange(8, dtype=np.int32), context=7)) == 1
    assert len(PackedWindows(np.arange(7, dtype=np.int32), context=7)) == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_padded_windows_divide_among_ranks_and_count_each_token_once(world):
    windows = PackedWindows(np.arange(50, dtype=np.int32), context=12, pad_to=world)
    assert len(windows) % world == 0
    batch = windows.__getitems__(list(range(len(windows))))
    assert sorted(batch["labels"][:, 1:][batch["labels"][:, 1:] != -100].tolist()) == list(range(1, 50))


def test_equal_documents_fall_on_one_side():
    texts = [f"text {i % 40} " * 5 for i in range(120)]
    halves = split_documents(texts, 0.2, seed=0)
    assert not set(halves.train) & set(halves.val)
    assert sorted(halves.train + halves.val) == sorted(texts)
    share = sum(map(len, halves.val)) / sum(map(len, texts))
    assert 0.2 <= share < 0.2 + 3 * 50 / sum(map(len, texts)) + 1e-9
    assert split_documents(texts, 0.2, seed=1) != halves
    assert split_documents(texts, 0.2, seed=0) == halves


def test_a_lone_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(100))
    halves = split_documents([text], 0.1, seed=0)
    assert halves.train[0] + halves.val[0] == text
    assert halves.train[0].endswith("\n")
    assert 0.09 < len(halves.val[0]) / len(text) < 0.12


def test_bigram_floor_is_the_conditional_entropy():
    text = "abracadabra äö abra\n" * 3 + "cab"
    data = ["", *[bytes([b]) for b in text.encode()]]
    pairs, rows = Counter(itertools.pairwise(data)), Counter(data[:-1])
    bits = -sum(n * math.log2(n / rows[a]) for (a, _), n in pairs.items())
    assert bigram_floor([text]) == pytest.approx(bits / len(text.encode()), abs=1e-12)


def test_no_bigram_model_gets_below_the_floor():
    texts = ["the cat sat on the mat, the rat ran", "a cat and a rat"]
    floor = bigram_floor(texts)
    logits = torch.zeros(257, 256, dtype=torch.float64, requires_grad=True)
    previous = torch.tensor([b for t in texts for b in (256, *t.encode()[:-1])])
    current = torch.tensor([b for t in texts for b in t.encode()])
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits[previous], current) / math.log(2)
        value.backward()
        return value

    optimizer.step(loss)
    assert floor <= loss().item() == pytest.approx(floor, abs=1e-2)


def test_bigram_floor_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        bigram_floor(["", ""])
