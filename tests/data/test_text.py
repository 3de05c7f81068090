"""TextDataModule: its corpus, and its place in it after a restart."""

import hashlib
import json
import random
from pathlib import Path

import lightning as L
import pytest
import tokenizers
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

from evolute.data import ByteTokenizer, TextDataModule, load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(20)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path, texts


def data(corpus, **kwargs):
    return TextDataModule(str(corpus[0]), **{"context": 16, "batch_size": 12, "val_fraction": 0.1, "seed": 5} | kwargs)


def test_hash_covers_the_documents_in_order(corpus, tmp_path):
    module = data(corpus)
    module.setup()
    digest = hashlib.sha256(b"".join(len(t.encode()).to_bytes(8, "big") + t.encode() for t in corpus[1])).hexdigest()
    assert module.corpus_sha256 == digest
    assert module.resolved_hparams() == {"sha256": digest}
    data(corpus, sha256=digest).setup()
    with pytest.raises(ValueError, match=f"has sha256 {digest}, but sha256='0123' is asked for"):
        data(corpus, sha256="0123").setup()
    rows = corpus[0].read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text("".join(reversed(rows)))
    other = TextDataModule(str(tmp_path), context=16, batch_size=4)
    other.setup()
    assert other.corpus_sha256 != digest


def test_max_bytes_keeps_whole_documents(corpus):
    limit = sum(len(t) for t in corpus[1][:15]) + 3
    module = data(corpus, max_bytes=limit)
    module.setup()
    assert module.corpus_sha256 == _hash(corpus[1][:15])


def _hash(texts):
    return hashlib.sha256(b"".join(len(t).to_bytes(8, "big") + t.encode() for t in texts)).hexdigest()


def test_validation_covers_its_text_exactly_and_shares_none(corpus):
    module = data(corpus)
    module.setup()
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in module.val_dataloader()])
    text = ByteTokenizer().decode(labels[labels != -100])
    assert text == "\n<|end|>\n".join(module.val_texts) + "\n<|end|>\n"
    size = sum(len(t.encode()) for t in module.val_texts)
    assert module.val_bytes_per_token == pytest.approx(size / (size + len(module.val_texts)))
    train = torch.cat([b["input_ids"].flatten() for b in module.train_dataloader()])
    assert not [t for t in module.val_texts if t in ByteTokenizer().decode(train)]
    assert 0 < module.bigram_floor() < 8


def test_workers_do_not_change_the_order_nor_the_global_generator(corpus):
    module, workers = data(corpus), data(corpus, num_workers=2)
    module.setup(), workers.setup()
    before = torch.get_rng_state()
    one = [b["input_ids"] for b in module.train_dataloader()]
    two = [b["input_ids"] for b in workers.train_dataloader()]
    assert torch.equal(before, torch.get_rng_state())
    assert len(one) == len(two) > 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert {tuple(b.shape) for b in one} == {(12, 17)}


@pytest.mark.parametrize("text", ["plain", "häß €𝄞", "", "\ud800 lone"])
def test_byte_tokenizer_round_trip(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8", "surrogatepass"))
    if text.isprintable():
        assert tokenizer.decode(ids) == text


def hf_folder(path: Path, **special) -> str:
    words = ["[unk]", "</s>", "alpha", "beta", "gamma", "delta", "epsilon"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[unk]", **special).save_pretrained(path)
    return str(path)


def test_a_hugging_face_tokenizer_from_a_folder(corpus, tmp_path):
    module = data(corpus, tokenizer=hf_folder(tmp_path / "t", eos_token="</s>"), context=8, batch_size=4)
    module.setup()
    assert (module.tokenizer.vocab_size, module.tokenizer.eos_id) == (7, 1)
    assert module.tokenizer.encode("beta alpha").tolist() == [3, 2]
    words = sum(len(t.split()) + 1 for t in module.val_texts)
    assert module.val_bytes_per_token == pytest.approx(sum(map(len, module.val_texts)) / words)
    with pytest.raises(ValueError, match="no eos, sep or bos token"):
        load_tokenizer(hf_folder(tmp_path / "u"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/t.*no such file or folder"):
        load_tokenizer("/nowhere/t")


class Recorder(L.LightningModule):
    """A small model that remembers a digest of every batch it is trained on."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(257, 4)
        self.head = torch.nn.Linear(4, 257)
        self.seen: list[tuple[int, str]] = []

    def loss(self, batch):
        ids = batch["input_ids"]
        return torch.nn.functional.cross_entropy(self.head(self.table(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:12]
        self.seen.append((self.global_step, digest))
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        # Reading the length here makes Lightning create the first iterator before it restores its progress.
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["trained"] = len(self.seen)


def run(corpus, folder, checkpoint=None, save=None, workers=0, **trainer):
    torch.manual_seed(0)
    module = Recorder()
    callbacks = [] if save is None else [ModelCheckpoint(folder, "{step}", save_top_k=-1, **save)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_steps": 16, "val_check_interval": 2, "num_sanity_val_steps": 0} | trainer
    loop = L.Trainer(**quiet, **options, callbacks=callbacks, enable_checkpointing=save is not None)
    loop.fit(module, data(corpus, num_workers=workers), ckpt_path=checkpoint, weights_only=True)
    return module, loop


BATCH_END = {"every_n_train_steps": 1}
VALIDATION_END = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
TRAINERS = [
    {},
    {"accumulate_grad_batches": 2},
    {"max_steps": -1, "max_epochs": 3},
    {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2},
    {"limit_train_batches": 3},
    {"val_check_interval": 1.0},
    {"val_check_interval": 4, "check_val_every_n_epoch": None},
    {"limit_val_batches": 0, "val_check_interval": 1.0},
]


@pytest.mark.parametrize("trainer", TRAINERS, ids=str)
@pytest.mark.parametrize("save", [BATCH_END, VALIDATION_END, EPOCH_END], ids=["batch", "validation", "epoch"])
def test_a_resumed_run_sees_the_batches_and_ends_at_the_weights_of_a_whole_one(corpus, tmp_path, save, trainer):
    check_resume(corpus, tmp_path, save, 0, trainer)


@pytest.mark.parametrize("save", [BATCH_END, EPOCH_END], ids=["batch", "epoch"])
def test_resume_with_workers_that_fetch_ahead(corpus, tmp_path, save):
    check_resume(corpus, tmp_path, save, 2, {"max_steps": 9, "accumulate_grad_batches": 2}, every=3)


def check_resume(corpus, tmp_path, save, workers, trainer, every=1):
    whole, loop = run(corpus, tmp_path, save=save, workers=workers, **trainer)
    per_epoch = loop.num_training_batches
    epochs = [[d for _, d in whole.seen[i : i + per_epoch]] for i in range(0, len(whole.seen), per_epoch)]
    assert len(epochs) > 2
    assert all(len(set(e)) == len(e) for e in epochs)  # an epoch repeats no batch
    assert epochs[0] != epochs[1] != epochs[2]
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    if trainer.get("limit_val_batches") == 0 and save is VALIDATION_END:
        assert not checkpoints
        return
    assert len(checkpoints) > 1
    for path in checkpoints[::every]:
        trained = torch.load(path, weights_only=True)["trained"]
        resumed, _ = run(corpus, tmp_path, checkpoint=path, workers=workers, **trainer)
        assert resumed.seen == whole.seen[trained:], path.name
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)), path.name


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 6}, {"context": 8}, {"max_bytes": 1000}], ids=str)
def test_a_place_in_other_data_is_refused(corpus, tmp_path, change):
    _, loop = run(corpus, tmp_path, max_steps=3)
    loop.save_checkpoint(tmp_path / "a.ckpt")
    loop.validate(Recorder(), data(corpus, **change), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    with pytest.raises(ValueError, match="the checkpoint was trained with"):
        loop.fit(Recorder(), data(corpus, **change), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
