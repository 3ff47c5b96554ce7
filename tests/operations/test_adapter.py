"""Adapters: the formula against networks written out, identity on every family and base, rows of them, what stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import GraphError, PlanError, ProgramError
from surgery.graph.edge import CHILD, Edge
from surgery.operations.adapter import ACTIVATIONS
from tests import zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

HOULSBY = "adapter bottleneck 5 after attn, ffn"
PARALLEL = "adapter bottleneck 5 gelu beside ffn scale 4"
ROW = "adapter bottleneck 3 beside ffn then b as a; adapter bottleneck 4 tanh norm after ffn as b"
EVERYWHERE = (*zoo.FAMILIES, *zoo.PLAIN)


def apply(text: str, specimen: zoo.Specimen) -> Any:
    return surgery.apply(surgery.parse(text), specimen.model, example_inputs=specimen.example)


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for what the program added, as after training."""
    tensors = surgery.parameters(model)
    for name, tensor in tensors.items():
        tensor.add_((0.3 * torch.randn(tensor.shape, generator=zoo.seeded(seed, name))).to(tensor.dtype))
    return tensors


def of(tensors: dict[str, Tensor], path: str, name: str = "") -> dict[str, Tensor]:
    """The tensors of one edge under their short names."""
    start = f"{path}.{CHILD}.{name}adapter_"
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def bottleneck(x: Tensor, w: dict[str, Tensor], f: Any = F.relu, scale: float = 1.0) -> Tensor:
    """s (W_up f(W_down x + b) + c), written out."""
    return scale * (f(x @ w["down_weight"].t() + w["down_bias"]) @ w["up_weight"].t() + w["up_bias"])


# The formula


class Written(ReferenceDecoder):
    """A reference decoder whose layers are written out with a function at each edge: (y, x, layer, role) -> y."""

    edge: Any

    def layer(self, number: int, x: Tensor, *positions: Tensor) -> Tensor:
        layer: Any = self.layers[number]
        h = layer.attention_norm(x)
        x = x + self.edge(layer.attention(h, *positions), h, number, "attention.o")
        h = layer.ffn_norm(x)
        return x + self.edge(layer.ffn(h), h, number, "ffn.down")

    def forward(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens)
        cos, sin = self.rotary(torch.arange(length)[None], x)
        visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        for number in range(len(self.layers)):
            x = self.layer(number, x, cos, sin, visible)
        return self.head(self.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_three_papers_written_out(fused: bool) -> None:
    """Houlsby's after both, Pfeiffer's after the ffn, the parallel one beside it, on a decoder in float64."""
    shape = Shape(vocabulary=31, width=18, layers=2, heads=3, key_value_heads=1, ffn=25, bias=True, fused=fused)
    tokens = zoo.tokens(31)

    def houlsby(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(y, w)

    def pfeiffer(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(y, w, F.silu) if role == "ffn.down" else y

    def parallel(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(x, w, F.gelu, 4.0) if role == "ffn.down" else y

    for text, meaning in (
        (HOULSBY, houlsby),
        ("adapter bottleneck 5 swish after ffn", pfeiffer),
        (PARALLEL, parallel),
    ):
        model = reference_decoder(shape)
        written = reference_decoder(shape)
        written.__class__ = Written
        base = model(tokens)
        surgery.apply(surgery.parse(text), model, example_inputs=(tokens,))
        assert torch.equal(model(tokens), base)
        tensors = trained(model)
        written.edge = lambda y, x, layer, role, tensors=tensors, meaning=meaning: meaning(
            of(tensors, f"layers.{layer}.{role}"), y, x, role
        )
        assert torch.allclose(model(tokens), written(tokens), rtol=0, atol=1e-12)
        assert (model(tokens) - base).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("word", ACTIVATIONS)
def test_activations(word: str) -> None:
    """Every word means torch's function of that name, or the one that it is an alias of."""
    aliases = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "swish": F.silu}
    plain = word in ("identity", "linear")
    function = (lambda x: x) if plain else aliases.get(word) or getattr(F, word)
    model = reference_decoder(Shape(layers=1))
    surgery.apply(surgery.parse(f"adapter {word} bottleneck 4 after ffn"), model, example_inputs=(zoo.tokens(61),))
    edge = model.layers[0].ffn.down.surgery_edge
    w = of(trained(model), "layers.0.ffn.down")
    y = torch.randn(3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    assert torch.allclose(edge(y, None), y + bottleneck(y, w, function), rtol=0, atol=1e-12)
    assert plain or not torch.allclose(edge(y, None), y + bottleneck(y, w, lambda x: x))


@torch.no_grad()
def test_learned_scale_norm_and_dropout() -> None:
    model = reference_decoder(Shape(layers=1))
    text = "adapter bottleneck 40 beside ffn scale learned 3 dropout 50% norm"
    surgery.apply(surgery.parse(text), model, example_inputs=(zoo.tokens(61),))
    edge: Edge = model.layers[0].ffn.down.surgery_edge
    w = of(surgery.parameters(model), "layers.0.ffn.down")
    assert w["scale"].tolist() == [3.0]
    trained(model)
    y, x = torch.randn(2, 3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    normed = F.layer_norm(x, (32,), w["norm_weight"], w["norm_bias"])
    expected = y + bottleneck(normed, w, F.relu, float(w["scale"]))
    assert torch.allclose(edge(y, x), expected, rtol=0, atol=1e-12)
    edge.train()
    torch.manual_seed(0)
    hidden = F.dropout(F.relu(normed @ w["down_weight"].t() + w["down_bias"]), 0.5)
    dropped = y + w["scale"] * (hidden @ w["up_weight"].t() + w["up_bias"])
    torch.manual_seed(0)
    assert torch.allclose(edge(y, x), dropped, rtol=0, atol=1e-12)
    assert not torch.allclose(dropped, expected)


# Identity, off, the rest of the model


@torch.no_grad()
@pytest.mark.parametrize("base", ["", "quantize base nf4; ", "prune magnitude 50% on attn + ffn; "])
@pytest.mark.parametrize("family", EVERYWHERE)
def test_identity_at_the_start(family: str, base: str) -> None:
    """To the bit, in train and eval mode, over 4-bit and pruned bases; and off, once it is something else."""
    dtype = torch.float64 if family in zoo.PLAIN and not base else torch.float32
    plain = zoo.specimen(family, dtype=dtype)
    if base:
        apply(base, plain)
    specimen = zoo.specimen(family, dtype=dtype)
    apply(f"{base}{ROW}; adapter bottleneck 5 after attn", specimen)
    for mode in (False, True):
        plain.model.train(mode)
        specimen.model.train(mode)
        assert torch.equal(specimen.logits(), plain.logits())
    specimen.model.eval()
    plain.model.eval()
    trained(specimen.model)
    assert not torch.allclose(specimen.logits(), plain.logits(), atol=1e-2)
    with surgery.disabled(specimen.model):
        assert torch.equal(specimen.logits(), plain.logits())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_over_16_bits(dtype: torch.dtype) -> None:
    """The adapter computes in float32 and its sum is rounded once; the model's own tensors stay 16 bits wide."""
    specimen = zoo.specimen("gpt2", dtype=dtype)
    base = specimen.logits()
    apply("adapter bottleneck 5 after ffn", specimen)
    assert torch.equal(specimen.logits(), base)
    tensors = trained(specimen.model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    edge = specimen.model.transformer.h[0].mlp.dropout.surgery_edge
    y = torch.randn(2, 7, 21, generator=zoo.seeded(0, "y")).to(dtype)
    expected = y + bottleneck(y.float(), of(tensors, "transformer.h.0.mlp.dropout"))
    assert torch.equal(edge(y, None), expected.to(dtype))
    assert specimen.logits().dtype == dtype


def test_gradients_reach_the_adapters_alone() -> None:
    for family in ("opt", "gpt_neox", "t5"):
        specimen = zoo.specimen(family)
        apply(ROW, specimen)
        trained(specimen.model)
        specimen.model.train()
        specimen.model(**specimen.inputs).logits.square().mean().backward()
        wanted = {name for name, p in specimen.model.named_parameters() if p.requires_grad}
        got = {name for name, p in specimen.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert got == wanted == set(surgery.parameters(specimen.model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*is deprecated:FutureWarning")
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """What is kept of a sub-layer's input is kept again when a layer is run again: gradients are the same bits."""
    found = []
    for checkpointed in (False, True):
        specimen = zoo.specimen(family)
        apply(ROW.replace("as b", "dropout 20% as b").replace("norm after", "after"), specimen)
        trained(specimen.model)
        specimen.model.train()
        if checkpointed:
            specimen.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            specimen.model.enable_input_require_grads()
        torch.manual_seed(0)
        specimen.model(**specimen.inputs, use_cache=False).logits.square().mean().backward()
        found.append({name: tensor.grad for name, tensor in surgery.parameters(specimen.model).items()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "nano"])
def test_compiled_as_one_graph(family: str) -> None:
    """Also where the model was compiled before anything hung on its edges, and switched off in between."""
    specimen = zoo.specimen(family, dtype=torch.float32)
    compiled = torch.compile(specimen.model, fullgraph=True, backend="aot_eager")

    def run() -> Tensor:
        out = compiled(*specimen.inputs) if specimen.example else compiled(**specimen.inputs, use_cache=False).logits
        assert isinstance(out, Tensor)
        return out

    base = run()
    apply(ROW, specimen)
    trained(specimen.model)
    assert torch.allclose(run(), specimen.logits(), atol=1e-5)
    assert not torch.allclose(run(), base, atol=1e-2)
    with surgery.disabled(specimen.model):
        assert torch.allclose(run(), base, atol=1e-5)


@torch.no_grad()
def test_copies_are_independent() -> None:
    """A copy's branches beside the ffn read the copy's input."""
    specimen = zoo.specimen("opt")
    apply(ROW, specimen)
    trained(specimen.model)
    before = specimen.logits()
    copied = copy.deepcopy(specimen.model)
    trained(copied, 1)
    assert not torch.allclose(zoo.logits(copied, specimen.inputs), before, atol=1e-2)
    assert torch.equal(specimen.logits(), before)
    for one, other in zip(
        surgery.parameters(specimen.model).values(), surgery.parameters(copied).values(), strict=True
    ):
        other.copy_(one)
    assert torch.equal(zoo.logits(copied, specimen.inputs), before)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    """Token by token from a cache, with padding on the left, as without a cache."""
    model = zoo.tiny("llama")
    surgery.apply(surgery.parse(ROW), model)
    trained(model)
    fed = zoo.padded(model)
    wanted = model.generate(**fed, max_new_tokens=6, do_sample=False, use_cache=False)
    found = model.generate(**fed, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", EVERYWHERE)
def test_saved_is_loaded(family: str, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    apply(f"{ROW}; adapter bottleneck 2 after attn", specimen)
    trained(specimen.model)
    surgery.save(specimen.model, tmp_path / "out")
    again = {"model": zoo.specimen(family).model} if specimen.example else {}
    loaded = surgery.load(tmp_path / "out", **again)
    assert torch.equal(zoo.logits(loaded, specimen.inputs), specimen.logits())
    assert surgery.verify(loaded, example_inputs=specimen.example)


@torch.no_grad()
def test_a_merge_leaves_adapters_and_folds_what_is_under_them() -> None:
    """LoRA on the very projection that the adapter hangs on folds into it, also over codes."""
    specimen = zoo.specimen("llama")
    apply(f"quantize base nf4; lora rank 2 on ffn.down + attn.o; {ROW}", specimen)
    trained(specimen.model)
    before = specimen.logits()
    surgery.merge(specimen.model)
    assert (specimen.logits() - before).abs().max() < 1e-4
    down = specimen.model.model.layers[0].mlp.down_proj
    assert type(down) is nn.Linear
    assert isinstance(down.surgery_edge, Edge)
    assert all("adapter" in name for name in surgery.parameters(specimen.model))
    assert surgery.verify(specimen.model)


# Several on one edge


@torch.no_grad()
def test_a_row_reads_what_comes_before() -> None:
    """`then` says the order, whatever the statements are called and however they are permuted."""
    lines = (
        "adapter bottleneck 2 after ffn then a as c",
        "adapter bottleneck 3 beside ffn then b as a",
        "adapter bottleneck 4 after ffn as b",
    )
    y, x = torch.randn(2, 3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
        model = reference_decoder(Shape(layers=1))
        surgery.apply(surgery.parse("\n".join(lines[i] for i in order)), model, example_inputs=(zoo.tokens(61),))
        tensors = trained(model)
        found.append(model.layers[0].ffn.down.surgery_edge(y, x))
        path = "layers.0.ffn.down"
        first = y + bottleneck(y, of(tensors, path, "c_"))
        second = first + bottleneck(x, of(tensors, path, "a_"))
        assert torch.allclose(found[-1], second + bottleneck(second, of(tensors, path, "b_")), rtol=0, atol=1e-12)
        with surgery.disabled(model):
            assert torch.equal(model.layers[0].ffn.down.surgery_edge(y, x), y)
        surgery.activate(model, "c")
        assert torch.allclose(model.layers[0].ffn.down.surgery_edge(y, x), first, rtol=0, atol=1e-12)
        surgery.activate(model, "b")
        alone = y + bottleneck(y, of(tensors, path, "b_"))
        assert torch.allclose(model.layers[0].ffn.down.surgery_edge(y, x), alone, rtol=0, atol=1e-12)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("adapter bottleneck 4 after ffn\nadapter bottleneck 5 beside ffn", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn as a\nadapter bottleneck 5 after ffn as b", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn then c as a\nadapter bottleneck 5 after ffn then c as b\n"
         "adapter bottleneck 6 after ffn as c", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn then b as a\nadapter bottleneck 5 after ffn as a", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after attn + ffn then b as a\nadapter bottleneck 5 after ffn as b", "S110", "no such"),
        ("adapter bottleneck 4 after ffn then b as a\nadapter bottleneck 5 after ffn then a as b", "S110", "and after"),
    ],
)  # fmt: skip
def test_what_cannot_stand_in_a_row(text: str, code: str, named: str) -> None:
    model = zoo.tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError) as refused:
        surgery.apply(surgery.parse(text), model)
    assert {each.code for each in refused.value.diagnostics} == {code}
    assert named in str(refused.value)
    assert all(each.span is not None for each in refused.value.diagnostics)
    assert before.keys() == model.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Bad input


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("adapter bottleneck 4 rellu after ffn", "S011", "did you mean 'relu'"),
        ("adapter bottleneck 4 relu gelu after ffn", "S016", "besides"),
        ("adapter bottleneck 4", "S018", "`after` or `beside`"),
        ("adapter bottleneck 4 on ffn", "S018", "write `after ffn`"),
        ("adapter bottleneck 4 after ffn on attn", "S007", "twice"),
        ("adapter bottleneck 4 after ffn beside attn", "S017", "two statements"),
        ("adapter bottleneck 0 after ffn", "S013", "at least 1"),
        ("adapter after ffn", "S015", "bottleneck"),
        ("adapter bottleneck 4 after fnn", "S020", "ffn"),
        ("adapter bottleneck 4 after ffn scale leaned", "S012", "learned"),
        ("adapter bottleneck 4 after ffn scale 0", "S017", "no adapter at all"),
        ("adapter bottleneck 4 after ffn scale learned 0", "S017", "no adapter at all"),
        ("adapter bottleneck 4 after ffn dropout 100%", "S013", "less than 100%"),
    ],
)
def test_what_is_not_understood(text: str, code: str, says: str) -> None:
    with pytest.raises(ProgramError) as refused:
        surgery.parse(text)
    assert code in {each.code for each in refused.value.diagnostics}
    assert says in str(refused.value)


@pytest.mark.parametrize("where", ["after ffn", "beside ffn"])
def test_a_feed_forward_without_any_module(where: str) -> None:
    from tests.anatomy.test_edges import Bare, Stack

    ids = torch.arange(6).view(2, 3)
    with pytest.raises(PlanError, match="no module gives its output") as refused:
        surgery.apply(surgery.parse(f"adapter bottleneck 4 {where}"), Stack(Bare), example_inputs=(ids,))
    assert {each.code for each in refused.value.diagnostics} == {"S101"}


def test_an_edge_that_is_no_tensor() -> None:
    """A module that gives something else at run time than when it was studied says so, and does not go on."""
    model = zoo.plain("nano", depth=1)
    surgery.apply(surgery.parse("adapter bottleneck 4 after ffn"), model, example_inputs=(zoo.tokens(51),))
    model.blocks[0].narrow.register_forward_hook(lambda module, args, output: {"y": output}, prepend=True)
    with pytest.raises(GraphError, match="gives a dict") as refused:
        model(zoo.tokens(51))
    assert refused.value.diagnostics[0].code == "S360"


# Other families


@torch.no_grad()
@pytest.mark.parametrize("name", ["PhiForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "MixtralForCausalLM",
                                  "Qwen2MoeForCausalLM", "Llama4ForCausalLM", "Gemma2ForCausalLM"])  # fmt: skip
def test_parallel_residuals_and_experts(name: str) -> None:
    """Identity at the start, the ffn's input beside it whatever shape it is read in, and off."""
    import transformers

    from tests.anatomy.test_edges import OTHERS

    config, fields, _ = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    ids = zoo.tokens(61)
    base = model(input_ids=ids, use_cache=False).logits
    surgery.apply(surgery.parse(f"{ROW}; adapter bottleneck 5 after attn"), model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)
    trained(model)
    assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, base, atol=1e-3)
    with surgery.disabled(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)
    assert surgery.verify(model)


class Encoder(nn.Module):
    """torch's own encoder, whose layers have a fast path that calls none of their modules."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 29, batch_first=True, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.stack(self.embed(ids))
        return hidden


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_layers(norm_first: bool) -> None:
    model, ids = Encoder(norm_first).eval(), torch.arange(14).view(2, 7)
    base = model(ids)
    text = "adapter bottleneck 3 beside ffn; adapter bottleneck 2 after attn"
    surgery.apply(surgery.parse(text), model, example_inputs=(ids,))
    # Without its fast path a layer of torch rounds otherwise.
    assert torch.allclose(model(ids), base, atol=1e-5)
    start = model(ids)
    trained(model)
    assert not torch.allclose(model(ids), start, atol=1e-2)
    with surgery.disabled(model):
        assert torch.equal(model(ids), start)
    assert surgery.verify(model, example_inputs=(ids,))


@torch.no_grad()
def test_one_layer_in_several_places() -> None:
    """ALBERT runs one layer again and again: each run reads the input of that run."""
    import transformers

    fields = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**fields, vocab_size=61, embedding_size=16)).eval()
    zoo.fill(model, 0)
    ids = zoo.tokens(61)
    base = model(input_ids=ids).logits
    surgery.apply(surgery.parse("adapter bottleneck 3 beside ffn"), model)
    assert torch.equal(model(input_ids=ids).logits, base)
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    (w,) = [of(trained(model), path) for path in ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",)]
    found = model(input_ids=ids).logits
    with surgery.disabled(model):
        given: list[Tensor] = []
        layer.ffn.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        layer.ffn_output.register_forward_hook(lambda module, args, y: y + bottleneck(given[-1], w))
        assert torch.allclose(model(input_ids=ids).logits, found, atol=1e-5)
    assert len(given) == 3


@torch.no_grad()
def test_cross_attention_and_one_stack() -> None:
    specimen = zoo.specimen("t5")
    base = specimen.logits()
    apply("adapter bottleneck 3 beside cross; adapter bottleneck 2 after attn, ffn in encoder", specimen)
    assert torch.equal(specimen.logits(), base)
    places = {name.partition(f".{CHILD}")[0] for name in trained(specimen.model)}
    encoder = {f"encoder.block.{layer}.layer.{number}.dropout" for layer in range(2) for number in range(2)}
    assert places == encoder | {f"decoder.block.{layer}.layer.1.dropout" for layer in range(3)}
    assert not torch.allclose(specimen.logits(), base, atol=1e-2)
    assert surgery.verify(specimen.model)


# Together with others


@torch.no_grad()
def test_rows_of_a_batch_choose() -> None:
    """One row through the first adapter of two, one through none of them."""
    specimen = zoo.specimen("llama")
    base = specimen.logits()
    apply(ROW, specimen)
    trained(specimen.model)
    with surgery.route(specimen.model, ["a", None]):
        routed = specimen.logits()
    surgery.activate(specimen.model, "a")
    assert torch.allclose(routed[0], specimen.logits()[0], atol=1e-5)
    assert torch.allclose(routed[1], base[1], atol=1e-5)
    assert not torch.allclose(routed[0], base[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("adapter bottleneck 3 after ffn", "lora rank 2 on ffn.down"),
        ("lora rank 2 on ffn.down + ffn.up", "adapter bottleneck 3 beside ffn"),
        ("adapter bottleneck 3 beside ffn as b", "adapter bottleneck 2 after ffn then b as a"),
    ],
)
def test_a_second_program(first: str, second: str) -> None:
    """On a module that is rewritten or replaced after its edge was hung on, or before: as if both had been one."""
    once, twice = zoo.specimen("opt"), zoo.specimen("opt")
    apply(f"{first}; {second}", once)
    apply(first, twice)
    apply(second, twice)
    trained(once.model)
    trained(twice.model)
    assert torch.equal(once.logits(), twice.logits())
    assert surgery.verify(twice.model)
