"""Which parameter is which, on modules whose answer is known by reading them."""

import pytest
import torch
import transformers
from torch import nn

from evolute.optim import MuonAdamW, Scion, parameter_groups, parameter_norms


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 11, bias=False)
        self.lm_head.weight = self.wte.weight


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.scale = nn.Parameter(torch.zeros(()))
        self.attention = nn.MultiheadAttention(8, 2)
        self.classifier = nn.Linear(8, 5)


class Wrapped(nn.Module):
    """A head with an unusual name, told by the Hugging Face method of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.output = nn.Linear(4, 4, bias=False)  # a hidden matrix despite its name
        self.model.unembed = nn.Linear(4, 9, bias=False)
        self.model.get_output_embeddings = lambda: self.model.unembed  # type: ignore[assignment]


def test_tied_embedding_counts_once_and_vectors_are_rms():
    assert parameter_norms(Tied()) == {
        "wte.weight": "sign",
        "block.weight": "spectral",
        "block.bias": "rms",
        "norm.weight": "rms",
        "norm.bias": "rms",
    }


def test_filters_attention_tokens_and_a_named_head():
    norms = parameter_norms(Vision())
    spectral = {name for name, norm in norms.items() if norm == "spectral"}
    assert spectral == {"stem.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert {name for name, norm in norms.items() if norm == "sign"} == {"classifier.weight"}
    assert norms["token"] == norms["scale"] == norms["classifier.bias"] == "rms"


def test_get_output_embeddings_beats_the_names():
    assert parameter_norms(Wrapped()) == {"model.output.weight": "spectral", "model.unembed.weight": "sign"}


def test_a_hugging_face_llama():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    module = nn.ModuleDict({"model": transformers.LlamaForCausalLM(config)})
    norms = parameter_norms(module)
    assert {n for n, norm in norms.items() if norm == "sign"} == {
        "model.model.embed_tokens.weight",
        "model.lm_head.weight",
    }
    assert sum(norm == "spectral" for norm in norms.values()) == 2 * 7
    assert {n.split(".")[-2] for n, norm in norms.items() if norm == "rms"} == {
        "input_layernorm", "post_attention_layernorm", "norm"
    }  # fmt: skip


def test_lora_factors_are_spectral_wherever_they_sit_and_frozen_is_skipped():
    model = nn.ModuleDict({"lm_head": nn.ModuleDict({"base_layer": nn.Linear(4, 9)})})
    model["lm_head"].register_parameter("lora_A", nn.Parameter(torch.zeros(2, 4)))
    model["lm_head"].register_parameter("lora_embedding_B", nn.Parameter(torch.zeros(9, 2)))
    model["lm_head"]["base_layer"].requires_grad_(False)
    assert parameter_norms(model) == {"lm_head.lora_A": "spectral", "lm_head.lora_embedding_B": "spectral"}


def test_overrides_by_whole_name_first_match_wins_and_aliases_count():
    norms = parameter_norms(Tied(), {"lm_head.weight": "spectral", r"block\..*": "rms", "block.weight": "sign"})
    assert norms["wte.weight"] == "spectral"
    assert norms["block.weight"] == "rms"


def test_groups_keep_names_and_cover_every_trainable_parameter_once():
    module = Vision()
    groups = parameter_groups(module)
    assert [g["norm"] for g in groups] == ["spectral", "sign", "rms"]
    named = {name: p for group in groups for name, p in group["params"]}
    assert named.keys() == dict(module.named_parameters()).keys()
    assert all(named[name] is p for name, p in module.named_parameters())
    assert Scion(module).param_groups[1]["param_names"] == ["classifier.weight"]


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        ({"nope.*": "rms"}, "'nope"),
        ({"block": "rms"}, "'block' matches"),
        ({"block.weight": "nuclear"}, "'nuclear'"),
        ({"block.bias": "spectral"}, "'block.bias'"),
        ({"(": "rms"}, "no regular expression"),
    ],
)
def test_refusals_name_the_pattern(overrides, value):
    with pytest.raises(ValueError, match=value):
        parameter_norms(Tied(), overrides)


def test_nothing_trainable_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("make", [Scion, MuonAdamW])
def test_a_flat_piece_in_place_of_a_matrix_is_refused_not_stepped(make):
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    optimizer = make(module)
    (group,) = (g for g in optimizer.param_groups if any(p is module[0].weight for p in g["params"]))
    piece = nn.Parameter(module[0].weight.detach().flatten()[:10].clone())
    piece.grad = torch.ones_like(piece)
    group["params"] = [piece]
    before = piece.detach().clone()
    with pytest.raises(RuntimeError, match="flat tensor of 10 elements"):
        optimizer.step()
    assert torch.equal(piece, before)
