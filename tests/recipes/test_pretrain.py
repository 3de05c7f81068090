"""The language-model recipe: its loss, its numbers, its refusals, and the model it exports."""

import csv
import importlib.util
import itertools
import json
import math
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger

from evolute.data import TextDataModule
from evolute.recipes.llm import Pretrain, export
from evolute.recipes.llm.samples import sample
from evolute.recipes.llm.schedules import lr_factor

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} green bottles hang on the wall\n" * 4}) + "\n" for i in range(40))
    )
    return str(path)


def data(corpus, **kwargs):
    return TextDataModule(corpus, **{"context": 24, "batch_size": 4, "val_fraction": 0.1} | kwargs)


def trainer(folder, **kwargs):
    options = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    options |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=folder, **options | kwargs)


def recipe(cls=Pretrain, **kwargs):
    torch.manual_seed(0)
    return cls(config=TINY, **{"sample_tokens": 4, "lr": 1e-2} | kwargs)


def test_numbers_against_the_definition(corpus, tmp_path):
    module, datamodule = recipe(), data(corpus)
    loop = trainer(tmp_path, logger=CSVLogger(tmp_path, version=0), log_every_n_steps=2)
    loop.fit(module, datamodule)
    (metrics,) = loop.validate(module, datamodule, verbose=False)
    nats = 0.0
    for batch in datamodule.val_dataloader():
        logits = module.model.double()(input_ids=batch["input_ids"]).logits
        for row, labels in zip(logits.log_softmax(-1), batch["labels"], strict=True):
            nats -= sum(row[i, labels[i + 1]].item() for i in range(24) if labels[i + 1] >= 0)
    size = sum(len(t.encode()) for t in datamodule.val_texts)
    tokens = size + len(datamodule.val_texts)
    assert metrics["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["train/tokens_per_s"]] == [1, 3]
    assert all(float(r["train/tokens_per_s"]) > 0 for r in rows if r["train/tokens_per_s"])


def test_loss_on_respects_ignored_labels_and_has_no_effect():
    module = recipe(vocab_size=300)
    module.configure_model()
    ids = torch.randint(0, 257, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.4, -100)
    before = torch.get_rng_state()
    loss, logits, targets = module.loss_on({"input_ids": ids, "labels": labels})
    assert torch.equal(before, torch.get_rng_state())
    assert logits.shape == (16, 300)
    assert torch.equal(targets, labels[:, 1:].reshape(-1))
    hf = module.model(input_ids=ids, labels=labels).loss
    assert loss.item() == pytest.approx(hf.item(), rel=1e-5)


def test_learns_below_the_bigram_floor(corpus, tmp_path):
    torch.manual_seed(0)
    datamodule = data(corpus, context=64, batch_size=8)
    module = Pretrain(config=TINY | {"hidden_size": 32}, lr=3e-2, samples=0)
    loop = trainer(tmp_path, max_steps=150, gradient_clip_val=1.0, limit_val_batches=0)
    loop.fit(module, datamodule)
    loop.limit_val_batches = 1.0
    (metrics,) = trainer(tmp_path).validate(module, datamodule, verbose=False)
    assert metrics["val/bits_per_byte"] < 0.9 * datamodule.bigram_floor()


@pytest.mark.parametrize("optimizer", ["scion", "muon_adamw", "adamw", "sgd"])
def test_every_optimizer_lowers_the_loss(corpus, tmp_path, optimizer):
    module = recipe(optimizer=optimizer, samples=0, schedule="constant", weight_decay=0.01)
    loop = trainer(tmp_path, max_steps=12, limit_val_batches=0)
    batch = None

    class First(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, inputs, batch_idx):
            nonlocal batch
            if batch is None:
                batch = {k: v.clone() for k, v in inputs.items()}
                self.loss = pl_module.loss_on(batch)[0].item()

    first = First()
    loop.callbacks.append(first)
    loop.fit(module, data(corpus))
    assert module.loss_on(batch)[0].item() < first.loss - 0.1


def test_norms_by_name_pattern_override_the_automatic_choice(corpus, tmp_path):
    module = recipe(optimizer="scion", samples=0, norms={r".*down_proj\.weight": "sign"})
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data(corpus))
    down = module.model.model.layers[0].mlp.down_proj.weight
    found = [g["norm"] for g in module.trainer.optimizers[0].param_groups if any(p is down for p in g["params"])]
    assert found == ["sign"]


def test_export_opens_in_transformers_with_equal_logits(corpus, tmp_path):
    module = recipe()
    loop = trainer(tmp_path)
    loop.fit(module, data(corpus))
    loop.save_checkpoint(tmp_path / "a.ckpt")
    folder = export(tmp_path / "a.ckpt", tmp_path / "hf")
    assert (folder / "model.safetensors").is_file()
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 257, (2, 10))
    module.eval()
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, module(ids))
    # The folder is a model to go on from, and the checkpoint loads without the data module.
    again = Pretrain(model=str(folder))
    again.configure_model()
    loaded = Pretrain.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    for other in (again, loaded):
        pairs = zip(other.model.parameters(), module.model.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    assert loaded.hparams["vocab_size"] == 320


def test_export_refuses_what_is_not_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        export(tmp_path / "none.ckpt", tmp_path / "hf")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        export(tmp_path / "cut.ckpt", tmp_path / "hf")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of Pretrain"):
        export(tmp_path / "other.ckpt", tmp_path / "hf")


def test_samples_are_reproducible_and_draw_nothing_globally(corpus, tmp_path):
    module, datamodule = recipe(), data(corpus)
    trainer(tmp_path, val_check_interval=2).fit(module, datamodule)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 2, 4, 4]
    assert all(r["prompt"] and isinstance(r["text"], str) for r in rows)
    module.eval()
    prompts = torch.randint(0, 257, (2, 5))
    before = torch.get_rng_state()
    drawn = sample(module.model, prompts, 6, limit=257, temperature=0.8, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert drawn.shape == (2, 6)
    assert drawn.max() < 257
    generator, ids = torch.Generator().manual_seed(1), prompts  # the same without a cache
    for _ in range(6):
        probs = torch.softmax(module.model(input_ids=ids).logits[:, -1, :257] / 0.8, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], 1)
    assert torch.equal(drawn, ids[:, 5:])


class Broken(Pretrain):
    """The loss of the chosen batches is not a number."""

    bad: tuple[int, ...] = ()

    def loss_on(self, batch):
        loss, logits, targets = super().loss_on(batch)
        if self.training and self.trainer.fit_loop.epoch_loop.total_batch_idx in self.bad:
            loss = loss * math.nan
        return loss, logits, targets


class Weights(L.Callback):
    """Keeps the weights and the first moments after every batch."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = trainer.optimizers[0].state
        moments = [state[p]["exp_avg"].clone() for p in pl_module.parameters() if "exp_avg" in state[p]]
        self.kept.append([p.detach().clone() for p in pl_module.parameters()] + moments)


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nonfinite_loss_takes_no_step(corpus, tmp_path, accumulate):
    weights = Weights()
    module = recipe(Broken, schedule="constant", warmup=0)
    module.bad = (2,)
    options = {"accumulate_grad_batches": accumulate, "callbacks": [weights], "limit_val_batches": 0}
    loop = trainer(tmp_path, max_steps=4, gradient_clip_val=1.0, **options)
    loop.fit(module, data(corpus))
    ends = weights.kept[accumulate - 1 :: accumulate]  # after each optimizer step
    skipped = 2 // accumulate
    moved = [not equal(a, b) for a, b in itertools.pairwise(ends)]
    assert moved == [i + 1 != skipped for i in range(len(moved))]
    assert all(torch.isfinite(p).all() for p in ends[-1])
    assert loop.callback_metrics["train/nonfinite"] == 1


@pytest.mark.parametrize(("mode", "bad", "steps"), [("raise", (1,), 1), ("skip", (1, 2, 3), 3)])
def test_nonfinite_losses_raise_at_once_or_after_some_in_a_row(corpus, tmp_path, mode, bad, steps):
    module = recipe(Broken, on_nonfinite=mode, max_nonfinite=3)
    module.bad = bad
    with pytest.raises(RuntimeError, match=f"not finite {len(bad)} step"):
        trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(module, data(corpus))
    assert module.trainer.global_step == steps


def test_schedules():
    cosine = lr_factor("cosine", 0.1, 100)
    assert [cosine(0), cosine(9), cosine(10)] == pytest.approx([1 / 11, 10 / 11, 1])
    assert [cosine(55), cosine(100)] == pytest.approx([0.5, 0.0])
    wsd = lr_factor("wsd", 5, 100)
    assert [wsd(5), wsd(80), wsd(90), wsd(100)] == pytest.approx([1, 1, 0.5, 0])
    assert lr_factor("constant", 4, math.inf)(1000) == 1
    with pytest.raises(ValueError, match="needs a length"):
        lr_factor("cosine", 4, math.inf)


BAD_ARGUMENTS = [
    ({"lr": 0.0}, "lr=0.0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"warmup": -1}, "warmup=-1"),
    ({"optimizer": "adam"}, "optimizer='adam'"),
    ({"max_nonfinite": 0}, "max_nonfinite=0"),
    ({"model": "x", "config": {}}, "give one"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Pretrain(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": TINY, "vocab_size": 100}, "tokenizer 'byte' has 257 ids, the model's vocabulary 100"),
        ({"config": {"model_type": "nonesuch"}}, "Hugging Face refuses it"),
        ({"model": "/nowhere/model"}, "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_serve_is_refused_on_one_line(corpus, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path).fit(Pretrain(**kwargs), data(corpus))
    assert "\n" not in str(caught.value)


def test_the_packaged_configuration_is_what_the_classes_take():
    from jsonargparse import ArgumentParser

    folder = Path(importlib.util.find_spec("evolute.recipes.llm").origin).parent
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int)
    for key in ("wandb", "tensorboard", "checkpoint_every"):  # the command line's own
        parser.add_argument(f"--{key}")
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    parser.add_class_arguments(L.Trainer, "trainer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = parser.instantiate(parser.parse_args(["--config", str(folder / "configs/pretrain.yaml")]))
    assert isinstance(made.model, Pretrain)
    assert isinstance(made.data, TextDataModule)
    assert made.trainer.max_steps == 1000
