"""A probe leaves no trace, whatever a module does in its step, and finds the loss and logits of real models."""

import random
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from evolute.callbacks import CurvatureMonitor, LayerMonitor, StepRadius
from evolute.callbacks.access import RecordLogits, batch_size, batch_tensors, probing, take_samples, with_tensors
from evolute.callbacks.access.backend import PlainBackend
from tests.conftest import fit, trainer_of
from tests.modules import Recorder, Snapshots, classification_data


def monitors():
    return [
        CurvatureMonitor(every_n_steps=1, budget=None, samples=8),
        StepRadius(every_n_steps=1, budget=None, samples=8),
        LayerMonitor(every_n_steps=1, budget=None),
    ]


class Hoarder(L.LightningModule):
    """Changes everything that a step can change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.accuracy = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(4)])
        self.mean = torchmetrics.MeanMetric()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.recent: deque[float] = deque(maxlen=3)
        self.nested = {"list": [1, [2, {"deep": 3}]], "set": {1, 2}, "tuple": ([1], torch.zeros(2))}
        self.tensor = torch.zeros(4)
        self.generators = [torch.Generator().manual_seed(1), random.Random(2), np.random.default_rng(3)]
        self.last: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        own, python, numpy = self.generators
        noise += float(torch.rand((), generator=own)) + python.random() + numpy.random()
        logits = self.net(x + 1e-3 * noise)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.count += 1
        self.replaced = self.replaced + noise
        self.recent.append(float(loss.detach()))
        self.nested["list"][1][1]["deep"] += 1
        self.nested["list"].append(noise)
        self.nested["set"].add(int(self.count))
        self.nested["tuple"][0].append(noise)
        self.nested["tuple"][1].add_(noise)
        self.nested[f"new{int(self.count)}"] = noise
        self.tensor.mul_(0.5).add_(noise)
        self.last = logits
        self.appeared = noise
        x.mul_(0)  # a step may spoil its batch
        self.log("loss", loss)
        self.log_dict(self.accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def everything(module: Any) -> dict[str, Any]:
    """Contents and identities of all that the module holds."""
    own, python, numpy = module.generators
    metrics = [module.mean, *module.accuracy.values()]
    return {
        "buffers": [b.clone() for b in module.buffers()],
        "buffer_ids": [id(b) for b in module.buffers()],
        "recent": list(module.recent),
        "nested": repr(module.nested),
        "tensor": module.tensor.clone(),
        "ids": [
            id(o)
            for o in (
                module.recent,
                module.nested,
                module.nested["list"],
                module.nested["list"][1],
                module.nested["list"][1][1],
                module.nested["set"],
                module.nested["tuple"],
                module.nested["tuple"][0],
                module.nested["tuple"][1],
                module.tensor,
                module.last,
                own,
                python,
                numpy,
            )
        ],
        "own": own.get_state(),
        "foreign": (python.getstate(), repr(numpy.bit_generator.state)),
        "metrics": [{k: v.clone() for k, v in vars(m).items() if isinstance(v, Tensor)} for m in metrics],
        "updates": [m._update_count for m in metrics],
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # type: ignore[index]
        "modes": [m.training for m in module.modules()],
        "names": sorted(vars(module)),
        "grads": [id(p.grad) for p in module.parameters()],
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("raises", [False, True])
def test_everything_comes_back_by_content_and_by_identity(raises):
    module = Hoarder()
    fit([], module, DataLoader(classification_data(), batch_size=8), max_steps=3)
    batch = take_samples(next(iter(DataLoader(classification_data(), batch_size=8))), 8)
    before = everything(module)

    def probe_it():
        with probing(module.trainer, module, PlainBackend(module.trainer), batch) as probe:
            assert not module.training
            assert probe.loss().requires_grad
            module.zero_grad()
            if raises:
                raise KeyError("inside")

    if raises:
        with pytest.raises(KeyError, match="inside"):
            probe_it()
    else:
        probe_it()
    assert_equal(before, everything(module))


def test_monitors_leave_no_trace_in_a_module_that_changes_everything():
    def run(callbacks):
        module, trainer = fit(callbacks, Hoarder, DataLoader(classification_data(), batch_size=8), max_epochs=1)
        picture = everything(module)
        for key in ("ids", "buffer_ids", "grads"):
            del picture[key]
        ours = ("curvature/", "step/", "layer/")
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(ours)}
        return picture, list(module.state_dict().values()), metrics

    assert_equal(run([]), run(monitors()))


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    words: str = "kept"


class Rows(Dataset):
    def __init__(self, kind):
        self.kind, self.data = kind, classification_data()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]

    def collate(self, rows):
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        match self.kind:
            case "dict":
                return {"x": x, "inner": {"y": y}, "note": "text"}
            case "dataclass":
                return Pair(x, y)
            case "encoding":
                from transformers import BatchEncoding

                return BatchEncoding({"x": x, "y": y})
        return x, y


class Flexible(L.LightningModule):
    """Takes any batch, under parameter names of its own, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)

    def training_step(self, b: Any, i: int) -> Any:
        match b:
            case Pair():
                x, y = b.x, b.y
            case (x, y):
                pass
            case _:
                x, y = b["x"], b["inner"]["y"] if "inner" in b else b["y"]
        return {"loss": F.cross_entropy(self.net(x), y), "extra": i}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "encoding"])
def test_batches_of_any_structure_are_cut_and_come_back_from_a_checkpoint(kind, tmp_path):
    rows = Rows(kind)
    loader = DataLoader(rows, batch_size=8, collate_fn=rows.collate)
    batch = next(iter(loader))
    assert batch_size(batch) == 8
    cut = take_samples(batch, 3)
    assert type(cut) is type(batch)
    assert [t.shape[0] for t in batch_tensors(cut)] == [3, 3]
    assert torch.equal(batch_tensors(cut)[0], batch_tensors(batch)[0][:3])
    batch_tensors(batch)[0].zero_()
    assert batch_tensors(cut)[0].any()  # a copy
    filled = with_tensors(batch, batch_tensors(cut))
    assert type(filled) is type(batch)
    assert torch.equal(batch_tensors(filled)[1], batch_tensors(cut)[1])
    with pytest.raises(ValueError, match="2 tensors, 1 were given"):
        with_tensors(batch, batch_tensors(cut)[:1])

    recorder, snapshots = Recorder(), Snapshots()
    _, trainer = fit([*monitors(), snapshots], Flexible, loader, logger=recorder, max_steps=2)
    net = nn.Linear(8, 4)
    net.load_state_dict({n.removeprefix("net."): w for n, w in snapshots.weights[1].items()})
    x, y = classification_data().tensors
    expected = F.cross_entropy(net(x[:8]), y[:8]).item()
    assert recorder.rows[0]["curvature/loss"] == pytest.approx(expected, rel=1e-5)

    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    resumed, snapshots = Recorder(), Snapshots()
    backwards = DataLoader(rows, batch_size=8, collate_fn=rows.collate, sampler=range(95, -1, -1))
    fit([*monitors(), snapshots], Flexible, backwards, logger=resumed, max_steps=3, ckpt_path=str(path))
    # The probe batch is still the first one of the run, which the resumed part does not meet first.
    net.load_state_dict({n.removeprefix("net."): w for n, w in snapshots.weights[1].items()})
    assert resumed.rows[2]["curvature/loss"] == pytest.approx(F.cross_entropy(net(x[:8]), y[:8]).item(), rel=1e-5)


class OnlyBatch(Flexible):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


def test_a_step_without_a_batch_index():
    recorder = Recorder()
    fit(monitors(), OnlyBatch, DataLoader(classification_data(), batch_size=8), logger=recorder, max_steps=2)
    assert recorder.rows[1]["curvature/sharpness"] > 0


def test_logits_are_recorded_at_every_way_of_calling_the_losses():
    z, y = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 7, 2])
    calls = [
        (lambda: F.cross_entropy(z, y.clamp(max=3)), z[[0, 1, 3, 4, 5]]),
        (lambda: F.cross_entropy(input=z, target=y.clamp(0, 3), ignore_index=3), z[[0, 1, 2, 5]]),
        (lambda: nn.CrossEntropyLoss(ignore_index=7)(z, y.clamp(min=0) % 4), z),
        (lambda: F.cross_entropy(z[0], torch.tensor(1)), z[:1]),
        (lambda: F.cross_entropy(z, z.softmax(1)), z),
    ]
    for call, rows in calls:
        with RecordLogits() as recorder:
            call()
        assert torch.equal(torch.cat(recorder.rows), rows)
    with RecordLogits() as recorder:
        nn.BCEWithLogitsLoss()(z, z.sigmoid())
    assert torch.equal(recorder.rows[0][:, 1], z.flatten())
    assert not recorder.rows[0][:, 0].any()


class Causal(L.LightningModule):
    """A Hugging Face model whose forward computes its own loss."""

    def __init__(self, kind: str, variant: str = "plain") -> None:
        super().__init__()
        import transformers as hf

        sizes = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "llama":
            config: Any = hf.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **sizes
            )
        else:
            config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **sizes)
        self.model: Any = hf.AutoModelForCausalLM.from_config(config)
        if variant == "lora":
            import peft

            self.model = peft.get_peft_model(
                self.model, peft.LoraConfig(r=2, target_modules=["q_proj"] if kind == "llama" else ["c_attn"])
            )
        elif variant != "plain":
            reentrant = variant == "reentrant"
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def tokens():
    return torch.randint(3, 40, (32, 12), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("variant", ["plain", "lora", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_models_are_measured_as_they_are(kind, variant):
    def run(callbacks):
        recorder, snapshots = Recorder(), Snapshots()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*finite differences.*")  # the exact engine must do
            module, _ = fit(
                [*callbacks, snapshots],
                lambda: Causal(kind, variant),
                DataLoader(tokens(), batch_size=8),
                logger=recorder,
                max_steps=3,
            )
        return module, recorder, snapshots

    base, _, _ = run([])
    module, recorder, snapshots = run(monitors())
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), module.parameters(), strict=True))

    def logits(weights):
        module.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return module.eval().model(input_ids=snapshots.batches[2]).logits[:, :-1]

    change = logits(snapshots.weights[3]) - logits(snapshots.weights[2])
    ratio = (change.amax(-1) - change.amin(-1)).max().item() / torch.pi
    assert recorder.rows[2]["step/ghost_ratio"] == pytest.approx(ratio, rel=1e-3, abs=1e-7)
    assert recorder.rows[2]["curvature/sharpness"] > 0


def test_sharpness_of_a_language_model_equals_that_of_its_dense_hessian():
    recorder, snapshots = Recorder(), Snapshots()
    monitor = CurvatureMonitor(every_n_steps=1, budget=None, samples=8, tol=1e-6, max_products=200)
    module, _ = fit(
        [monitor, snapshots],
        lambda: Causal("llama", "lora"),
        DataLoader(tokens(), batch_size=8),
        logger=recorder,
        max_steps=2,
        precision="64-true",
    )
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    module.load_state_dict({n: snapshots.weights[2][n] for n in trained}, strict=False)
    sizes = [p.numel() for p in trained.values()]

    def loss(flat):
        parts = {n: f.view_as(p) for (n, p), f in zip(trained.items(), flat.split(sizes), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(module.eval(), parts, (snapshots.batches[0],))

    Causal.forward = lambda self, batch: self.training_step(batch, 0)
    H = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in trained.values()]))
    assert recorder.rows[1]["curvature/sharpness"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-6)


def test_reentrant_checkpointing_does_not_stop_the_step_radius():
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=True))

    class Module(Flexible):
        def __init__(self):
            super().__init__()
            self.net = Reentrant()

    recorder = Recorder()
    data = DataLoader(classification_data(), batch_size=8)
    fit([StepRadius(every_n_steps=1, budget=None)], Module, data, logger=recorder, max_steps=2)
    assert recorder.rows[1]["step/ghost_ratio"] > 0


def test_half_precision_weights_are_widened_for_the_probe():
    module = Flexible()
    trainer = trainer_of([], precision="bf16-true", max_steps=1)
    trainer.fit(module, DataLoader(classification_data(), batch_size=8))
    assert module.net.weight.dtype is torch.bfloat16
    x, y = classification_data().tensors
    with probing(trainer, module, PlainBackend(trainer), (x[:4].bfloat16(), y[:4])) as probe:
        loss = probe.loss()
        wide = F.linear(x[:4].bfloat16().float(), module.net.weight.float(), module.net.bias.float())
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(wide, y[:4]).item(), rel=1e-6)
