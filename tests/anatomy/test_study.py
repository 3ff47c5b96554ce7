"""Studying touches nothing, costs no depth, and says why it cannot (promises: frame, free depth, plain errors)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.anatomy import Anatomy, study
from surgery.errors import ModelError
from tests import zoo


def roles(anatomy: Anatomy) -> dict[str, list[str]]:
    """Module paths by role, without blocks."""
    found: dict[str, list[str]] = {}
    for part in anatomy.parts:
        if part.kind != "block":
            found.setdefault(part.role, []).append(part.path)
    return found


def snapshot(model: nn.Module) -> list[tuple[str, int, int, bool]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(t), t._version, t.is_meta) for name, t in tensors]


@pytest.mark.parametrize("name", ["llama", "t5", "nano"])
def test_the_model_is_not_touched(name: str) -> None:
    specimen = zoo.specimen(name)
    model = specimen.model.train()
    before, modules = snapshot(model), [(n, id(m), m.training) for n, m in model.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    study(model, specimen.example)
    assert snapshot(model) == before
    assert [(n, id(m), m.training) for n, m in model.named_modules()] == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert getattr(getattr(model, "config", None), "use_cache", None) == cache


class Branching(nn.Module):
    """Its forward looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.sum() > 0:
            return y
        return -y


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [Branching, Interrupted])
def test_untouched_after_failure(kind: type[nn.Module]) -> None:
    model = kind()
    before = snapshot(model)
    with pytest.raises((ModelError, KeyboardInterrupt)):
        study(model, (torch.zeros(2, 3),))
    assert snapshot(model) == before


def test_not_exportable_names_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Branching())
    with pytest.raises(ModelError) as raised:
        study(model, (torch.zeros(2, 3),))
    assert raised.value.diagnostics[0].code == "S202"
    line = Branching.forward.__code__.co_firstlineno + 2
    assert re.search(rf"Branching, .*test_study\.py:{line}", raised.value.diagnostics[0].message)


def test_plain_models_need_inputs() -> None:
    with pytest.raises(ModelError) as raised:
        study(nn.Linear(3, 5))
    assert raised.value.diagnostics[0].code == "S201"
    assert "example_inputs" in str(raised.value)


def test_without_attention() -> None:
    """A model without attention is studied all the same."""
    found = roles(study(nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 5)), (torch.zeros(2, 3),)))
    assert set(found) <= {"linear", "head", "ffn.up", "ffn.down"}
    assert "attn" not in found


class Own(nn.Linear):
    """A linear map with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2.0, self.bias)


def test_subclass_with_its_own_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Own(3, 11)
            self.last = nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)))

    anatomy = study(Model(), (torch.zeros(2, 3),))
    assert {"first", "last"} == {part.path for part in anatomy.parts if part.kind == "projection"}


def test_torch_encoder_layer() -> None:
    """`nn.TransformerEncoder`: the fused `in_proj_weight` is a parameter of the attention module itself."""
    layer = nn.TransformerEncoderLayer(12, 3, 29, batch_first=True, dropout=0.0)
    anatomy = study(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.zeros(2, 7, 12),))
    assert [(s.name, s.path, s.depth) for s in anatomy.stacks] == [("encoder", "layers", 2)]
    first = {p.role: p for p in anatomy.parts if p.layer == 1 and p.kind == "projection"}
    for place, role in enumerate(("attn.q", "attn.k", "attn.v")):
        part = first[role]
        assert (part.path, part.parameter, part.bias) == ("layers.1.self_attn", "in_proj_weight", "in_proj_bias")
        assert (part.shape, part.channels) == ((36, 12), ((12 * place, 12 * place + 12),))
    assert first["attn.o"].path == "layers.1.self_attn.out_proj"
    assert (first["ffn.up"].path, first["ffn.down"].path) == ("layers.1.linear1", "layers.1.linear2")


def test_experts() -> None:
    """Stacked experts have a router before them and gate, up and down inside."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=24, intermediate_size=38, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, num_local_experts=5,
    )  # fmt: skip
    with torch.device("meta"):
        anatomy = study(transformers.MixtralForCausalLM(config))
    layer = [p for p in anatomy.parts if p.layer == 1]
    assert [p.path for p in layer if p.role == "router"] == ["model.layers.1.mlp.gate"]
    experts = {p.role: (p.parameter, p.shape, p.channels) for p in layer if p.kind == "experts" and p.role != "experts"}
    assert experts == {
        "ffn.gate": ("gate_up_proj", (5, 76, 24), ((0, 38),)),
        "ffn.up": ("gate_up_proj", (5, 76, 24), ((38, 76),)),
        "ffn.down": ("down_proj", (5, 24, 38), None),
    }
    assert [p.parameter for p in layer if p.role == "experts"] == ["gate_up_proj", "down_proj"]


def test_state_space() -> None:
    """No softmax, no attention roles: what goes in and comes out of the mixer, and nothing wrong."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=61, state_size=5)
    with torch.device("meta"):
        found = roles(study(transformers.MambaForCausalLM(config)))
    assert found["mixer.in"] == [f"backbone.layers.{n}.mixer.in_proj" for n in range(2)]
    assert found["mixer.out"] == [f"backbone.layers.{n}.mixer.out_proj" for n in range(2)]
    assert not [role for role in found if role.startswith(("attn", "ffn"))]


def shown(text: str) -> Iterator[str]:
    return (" ".join(line.split()) for line in text.split("\n"))


def test_show() -> None:
    lines = list(shown(str(study(zoo.tiny("gpt_neox")))))
    assert "decoder layers 0..2 of 3" in lines
    name = "gpt_neox.layers.*.attention.query_key_value"
    assert f"attn.k {name} 72 x 24 channels 3 runs of 8 every 24 from 8 bias" in lines


def large(depth: int) -> nn.Module:
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=depth, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"), no_init_weights():
        return transformers.LlamaForCausalLM(config)


def test_depth_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported of 160 layers of a 70B model is no more than of 80: repeated layers are studied once."""
    export = torch.export.export
    sizes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.export.ExportedProgram:
        program = export(*arguments, **options)
        sizes.append(len(program.graph.nodes))
        return program

    monkeypatch.setattr(torch.export, "export", counted)
    for depth in (80, 160):
        anatomy = study(large(depth))
        assert sum(part.role == "attn.q" for part in anatomy.parts) == depth
    assert len(sizes) == 2
    assert 0 < sizes[0] == sizes[1]


def test_what_cannot_be_exported_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Export prints the graph so far on its own; the error is what is to be read."""

    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if (x == 0).any() else x

    with pytest.raises(ModelError, match=r"S202.*Decides"):
        study(Decides(), (torch.zeros(2, 3),))
    assert capfd.readouterr() == ("", "")
