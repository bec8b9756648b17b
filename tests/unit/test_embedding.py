"""Placeholders' vectors: in prompts, in training through the text encoder, in files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from onewan.checkpoint.export import WanModelSaver
from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import CheckpointError, ConfigError
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.model.text import checkpoint_encoder, mentions, pad_text
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, WanModelSampler

FOX, INK = "<fox>", "<ink>"
BOTH = pytest.mark.parametrize("is_output", [False, True], ids=["input", "output"])
DATE = datetime(2026, 1, 2, tzinfo=timezone.utc)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, "ti2v-5b", width=32, layers=1)


@pytest.fixture
def load(folder) -> Callable[..., WanModel]:
    def load(dtype: torch.dtype = torch.float32) -> WanModel:
        return WanModelLoader().load(folder, dtype=dtype, components=["text_encoder", "tokenizer"])

    return load


@pytest.fixture
def model(load) -> WanModel:
    """Without placeholders; each test adds its own."""
    return load()


def vectors(count: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(count, 64, generator=generator))


def learned(
    placeholder: str = FOX, count: int = 2, *, is_output: bool = False, seed: int = 0
) -> WanModelEmbedding:
    return WanModelEmbedding(
        placeholder=placeholder,
        name=placeholder.strip("<>"),
        uuid=f"uuid of {placeholder}",
        vectors=vectors(count, seed),
        is_output_embedding=is_output,
    )


def ids(model: WanModel, text: str) -> list[int]:
    tokenizer, _ = model.prompt_encoder()
    return tokenizer(text, add_special_tokens=False).input_ids


def end(model: WanModel) -> list[int]:
    """The end token, as the tokenizer itself puts it."""
    tokenizer, _ = model.prompt_encoder()
    return tokenizer("").input_ids


def rows(model: WanModel, tokens: list[int]) -> Tensor:
    _, encoder = model.prompt_encoder()
    return encoder.shared.weight[tokens]


def encoded(model: WanModel, inputs_LD: Tensor) -> Tensor:
    """What the encoder makes of input vectors, by itself: no mask, no checkpointing."""
    _, encoder = model.prompt_encoder()
    return encoder(inputs_embeds=inputs_LD[None]).last_hidden_state[0]


# ------------------------------------------------------------------------------------- in prompts


def test_table_rows_in_their_own_place_change_no_bit(model):
    """So nothing but the vectors' numbers tells a placeholder from a word."""
    plain = model.encode_prompt("a red square moves slowly")
    red = ids(model, "red square")
    table = rows(model, red).clone()
    model.add_embedding(
        WanModelEmbedding(placeholder=FOX, name="fox", uuid="1", vectors=nn.Parameter(table))
    )
    assert len(red) > 2
    assert torch.equal(model.encode_prompt("a <fox> moves slowly"), plain)
    assert torch.equal(model.encode_prompt("a   <fox>\n moves slowly "), plain)
    assert torch.equal(model.encode_prompt("a &lt;fox&gt; moves slowly"), plain)


def test_input_vectors_take_the_place_of_the_placeholder(model):
    fox = learned(count=3)
    model.add_embedding(fox)
    with torch.no_grad():
        got = model.encode_prompt("the quick <fox> jumps")
        parts = rows(model, ids(model, "the quick")), fox.vectors, rows(model, ids(model, "jumps"))
        want = encoded(model, torch.cat([*parts, rows(model, end(model))]))
    assert torch.equal(got, want)


def test_output_vectors_leave_every_other_output_untouched(model):
    plain = model.encode_prompt("the quick jumps")
    fox = learned(count=3, is_output=True)
    model.add_embedding(fox)
    before = len(ids(model, "the quick"))
    for number in range(2):
        with torch.no_grad():
            fox.vectors.add_(number)  # as if it had trained
            got = model.encode_prompt("the quick <fox> jumps")
        assert torch.equal(got[before : before + 3], fox.vectors)
        assert torch.equal(torch.cat([got[:before], got[before + 3 :]]), plain)


def test_other_prompts_keep_their_bits(load):
    model, untouched = load(), load()
    _, encoder = model.prompt_encoder()
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    prompts = ["", "a red square", "the fox, <fo x>; " * 9, "x " * 600]
    for embedding in (learned(), learned(INK, is_output=True)):
        model.add_embedding(embedding)
    assert not model.encode_text(["<fox> and <ink>"]).isnan().any()
    for prompt in prompts:
        got = model.encode_prompt(prompt)
        assert torch.equal(got, untouched.encode_prompt(prompt)) and not got.requires_grad
    assert all(torch.equal(weights[name], weight) for name, weight in encoder.state_dict().items())
    tokenizer, _ = model.prompt_encoder()
    assert len(tokenizer) == len(untouched.prompt_encoder()[0])


@pytest.mark.parametrize("kinds", [(False, False), (False, True), (True, False), (True, True)])
def test_two_placeholders_in_one_prompt(model, kinds):
    fox, ink = learned(is_output=kinds[0]), learned(INK, 1, is_output=kinds[1], seed=1)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    assert model.all_embeddings() == [fox, ink]
    words = [rows(model, ids(model, text)) for text in ("a", "over", "by the river")]
    order = [words[0], ink, words[1], fox, fox, words[2], ink, rows(model, end(model))]
    with torch.no_grad():
        got = model.encode_prompt("a <ink> over <fox><fox> by the river<ink>")
        entering = [
            part if isinstance(part, Tensor) else part.vectors
            for part in order
            if isinstance(part, Tensor) or not part.is_output_embedding
        ]
        rest = encoded(model, torch.cat(entering))
    for part in order:
        output = not isinstance(part, Tensor) and part.is_output_embedding
        size = len(part) if isinstance(part, Tensor) else len(part.vectors)
        if output:
            assert torch.equal(got[:size], part.vectors)
        else:
            assert torch.equal(got[:size], rest[:size])
            rest = rest[size:]
        got = got[size:]
    assert len(got) == len(rest) == 0


def test_punctuation_is_tokenised_by_itself(model):
    """As ComfyUI does it, where vectors that were trained here shall mean the same."""
    fox = learned()
    model.add_embedding(fox)
    with torch.no_grad():
        got = model.encode_prompt("the dog (<fox>), said")
        parts = (
            rows(model, ids(model, "the dog (")),
            fox.vectors,
            rows(model, ids(model, "), said")),
        )
        assert torch.equal(got, encoded(model, torch.cat([*parts, rows(model, end(model))])))


@pytest.mark.parametrize(
    ("placeholder", "prompt", "found"),
    [
        ("sks", "a sks dog", True),
        ("sks", "sks", True),
        ("sks", "(sks), SKS", True),
        ("sks", "he asks for masks and sks2 and sks_b", False),
        ("sks", "SKS", False),
        ("sks", "一只sks在跑", True),
        ("<fox>", "two<fox>es", True),
        ("<fox>", "a &lt;fox&gt;", True),
        ("*a.b*", "x *a.b* y", True),
        ("*a.b*", "x *aXb* y", False),
        ("sks", "", False),
    ],
)
def test_where_a_placeholder_counts(model, placeholder, prompt, found):
    assert mentions(prompt, placeholder) is found
    plain = model.encode_prompt(prompt)
    model.add_embedding(learned(placeholder, 5, is_output=True))
    assert len(model.encode_prompt(prompt)) - len(plain) >= 5 or not found
    assert found or torch.equal(model.encode_prompt(prompt), plain)


def test_the_longer_of_two_that_begin_alike(model):
    fox, foxes = learned("fox!"), learned("fox!!", 4)
    model.embedding, model.additional_embeddings = fox, [foxes]
    with torch.no_grad():
        got = model.encode_prompt("fox!!")
        assert torch.equal(got, encoded(model, torch.cat([foxes.vectors, rows(model, end(model))])))


@BOTH
@pytest.mark.parametrize("words", [505, 509, 510, 511, 600])
def test_longest_prompts_end_with_the_end_token(model, is_output, words):
    one = ids(model, "a")
    assert len(one) == 1 and len(ids(model, "a a")) == 2
    fox = learned(count=4, is_output=is_output)
    model.add_embedding(fox)
    with torch.no_grad():
        late = model.encode_prompt("a " * words + FOX)
        early = model.encode_prompt(FOX + " a" * words)
        fitting = min(4, max(0, 511 - words))
        before = rows(model, one * min(words, 511))
        parts = [before, *([] if is_output else [fox.vectors[:fitting]]), rows(model, end(model))]
        want = encoded(model, torch.cat(parts))
    assert len(late) == min(512, words + 5) and len(early) == min(512, words + 5)
    if is_output:
        assert torch.equal(late[len(before) : len(before) + fitting], fox.vectors[:fitting])
        late = torch.cat([late[: len(before)], late[-1:]])
        assert torch.equal(early[:4], fox.vectors)
    assert torch.equal(late, want)


def test_padding(model):
    model.add_embedding(learned())
    text = model.encode_text(["a <fox>", "", "a red square"])
    assert text.shape == (3, 512, 64) and text.requires_grad
    lengths = [len(model.encode_prompt(p)) for p in ("a <fox>", "", "a red square")]
    for row, length, prompt in zip(text, lengths, ("a <fox>", "", "a red square"), strict=True):
        assert torch.equal(row[:length], model.encode_prompt(prompt)) and not row[length:].any()
    assert torch.equal(pad_text([torch.ones(512, 2)]), torch.ones(1, 512, 2))


def test_vectors_of_another_encoder_are_refused(model):
    wide = nn.Parameter(torch.zeros(2, 4096))
    for is_output in (False, True):
        model.embedding = WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="1", vectors=wide, is_output_embedding=is_output
        )
        with pytest.raises(CheckpointError, match="have 4096 numbers and the text encoder's 64"):
            model.encode_prompt("a <fox>")


# ------------------------------------------------------------------------------------- in training


def loss_of(model: WanModel, prompts: list[str]) -> Tensor:
    text = model.encode_text(prompts)
    weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
    return (text.float() * weights).square().mean() * 1000


@BOTH
def test_gradient_equals_finite_differences(model, is_output):
    fox = learned(is_output=is_output)
    model.add_embedding(fox)
    checkpoint_encoder(model.prompt_encoder()[1])
    prompts = ["the <fox> jumps", "a small blue circle", "<fox>, <fox>"]
    loss_of(model, prompts).backward()
    assert fox.vectors.grad is not None
    exact = fox.vectors.grad.double()
    model.prompt_encoder()[1].double()
    values = fox.vectors.detach().double()
    direction = torch.randn(2, 64, generator=torch.Generator().manual_seed(9)).double()
    # float64 behind the class's back, which holds float32: differences need the digits.
    ends = []
    for step in (1e-5, -1e-5):
        fox.vectors.data = values + step * direction
        with torch.no_grad():
            text = model.encode_text(prompts)
            weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
            ends.append((text * weights).square().mean() * 1000)
    slope = (ends[0] - ends[1]) / 2e-5
    assert (exact * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_plain_autograd(load, dtype):
    """Through the model, padded and checkpointed, against the encoder by itself."""
    model = load(dtype)
    _, encoder = model.prompt_encoder()
    plain = copy.deepcopy(encoder)
    fox, ink = learned(), learned(INK, 1, is_output=True, seed=1)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    checkpoint_encoder(encoder)
    text = model.encode_text(["the <fox> <ink> jumps"])
    assert text.dtype == dtype
    weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
    (text.float() * weights).square().sum().backward()

    own, out = (e.vectors.detach().clone().requires_grad_() for e in (fox, ink))
    before, after = ids(model, "the"), [*ids(model, "jumps"), *end(model)]
    inputs = torch.cat([plain.shared.weight[before], own.to(dtype), plain.shared.weight[after]])
    outputs = plain(inputs_embeds=inputs[None]).last_hidden_state[0]
    place = len(before) + 2
    want = torch.cat([outputs[:place], out.to(dtype), outputs[place:]])
    assert torch.equal(text[0, : len(want)], want)
    (want.float() * weights[: len(want)]).square().sum().backward()
    for embedding, reference in ((fox, own), (ink, out)):
        got = embedding.vectors.grad
        assert got is not None and got.dtype == torch.float32 and got.abs().max() > 0
        torch.testing.assert_close(got, reference.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_keeps_every_bit_and_draws_nothing(load, dtype):
    kept: list[Tensor] = []
    saved: list[int] = []
    for checkpointed in (False, True):
        model = load(dtype)
        _, encoder = model.prompt_encoder()
        encoder.requires_grad_(True)
        if checkpointed:
            checkpoint_encoder(encoder)
            checkpoint_encoder(encoder)  # once more is no more
        else:
            encoder.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        fox = learned()
        model.add_embedding(fox)
        bytes_kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        calls = 0

        def called(*_: object) -> None:
            nonlocal calls
            calls += 1

        encoder.encoder.block[1].layer[0].register_forward_hook(called)
        state = torch.get_rng_state()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(model, ["the quick <fox> jumps over the lazy dog"])
        loss.backward()
        assert calls == 1 + checkpointed
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module.training for module in encoder.modules())
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert fox.vectors.grad is not None
        kept += [loss.detach(), fox.vectors.grad]
        saved.append(bytes_kept)
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[1], kept[3])
    assert saved[1] < saved[0] / 4


def test_checkpointed_encoder_can_be_copied(model):
    _, encoder = model.prompt_encoder()
    checkpoint_encoder(encoder)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        twin.encoder.block[0].layer[0].layer_norm.weight.mul_(2)
        tokens = torch.tensor([end(model)])
        assert not torch.equal(twin(tokens).last_hidden_state, encoder(tokens).last_hidden_state)


def test_gradients_only_where_they_are_asked_for(model):
    fox, ink = learned(), learned(INK, is_output=True)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    with torch.no_grad():
        assert not model.encode_text(["<fox> <ink>"]).requires_grad
    assert model.encode_text(["<ink>"]).requires_grad
    fox.vectors.requires_grad_(False)
    graph_inputs: list[bool] = []
    _, encoder = model.prompt_encoder()
    encoder.encoder.block[0].register_forward_hook(
        lambda _module, _inputs, output: graph_inputs.append(output.requires_grad)
    )
    assert model.encode_text(["<fox> <ink>"]).requires_grad
    ink.vectors.requires_grad_(False)
    assert not model.encode_text(["<fox> <ink>"]).requires_grad
    assert graph_inputs == [False, False], "the encoder kept a graph that nobody needs"


@BOTH
def test_vectors_learn(model, is_output):
    """Towards what the model makes of a word."""
    target = model.encode_prompt("a small blue circle")
    model.add_embedding(
        WanModelEmbedding.initial(
            model,
            placeholder=FOX,
            initial_text="the lazy dog",
            token_count=len(ids(model, "blue")),
            is_output_embedding=is_output,
        )
    )
    fox = model.embedding
    optimizer = torch.optim.Adam([fox.vectors], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model.encode_prompt("a small <fox> circle") - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# ------------------------------------------------------------------------------ from text and files


def test_initial_input_vectors_are_rows_of_the_table(model):
    tokens = ids(model, "red square")
    count = len(tokens)
    assert count > 2
    fox = WanModelEmbedding.initial(model, placeholder=FOX, initial_text=" red  square ")
    assert torch.equal(fox.vectors, rows(model, tokens))
    assert fox.vectors.requires_grad and fox.vectors.is_leaf
    assert (fox.name, fox.initial_text, fox.is_output_embedding) == ("fox", " red  square ", False)
    longer = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", token_count=2 * count + 1, name="other"
    )
    assert torch.equal(longer.vectors, rows(model, [*tokens, *tokens, tokens[0]]))
    assert longer.name == "other"
    shorter = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", token_count=1
    )
    assert torch.equal(shorter.vectors, rows(model, tokens[:1]))
    with torch.no_grad():
        fox.vectors.add_(1)
    assert not torch.equal(fox.vectors, rows(model, tokens)), "it shares the table's memory"


def test_initial_output_vectors_are_what_the_encoder_makes_of_the_text(model):
    fox = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", is_output_embedding=True
    )
    assert torch.equal(fox.vectors, model.encode_prompt("red square")[:-1])
    assert fox.is_output_embedding and fox.vectors.requires_grad


def test_initial_vectors_of_a_bfloat16_encoder_are_float32(load):
    model = load(torch.bfloat16)
    for is_output in (False, True):
        fox = WanModelEmbedding.initial(model, placeholder=FOX, is_output_embedding=is_output)
        assert fox.vectors.dtype == torch.float32 and fox.initial_text == "*"
        model.embedding = fox
        assert model.encode_prompt("a <fox>").dtype == torch.bfloat16


def test_a_resumed_run_keeps_the_uuid(model):
    def uuid(**given) -> str:
        return WanModelEmbedding.initial(model, **given).uuid

    assert uuid(placeholder=FOX) == uuid(placeholder=FOX, initial_text="red")
    assert len({uuid(placeholder=p, seed=s) for p in (FOX, INK) for s in (0, 1)}) == 4


@pytest.mark.parametrize("text", ["", "  "])
def test_initial_text_without_tokens(model, text):
    with pytest.raises(ConfigError, match="initial_text: .* has no tokens"):
        WanModelEmbedding.initial(model, placeholder=FOX, initial_text=text, token_count=2)


def test_placeholders_that_no_prompt_can_contain():
    for wrong, why in (
        ("&amp;", "would be '&' in a cleaned prompt"),
        ("a b", "has a space"),
        ("", "would be|has a space"),
        ("\u201cfox\u201d", "would be '\"fox\"'"),
    ):
        with pytest.raises(ConfigError, match=f"placeholder: .*({why}).*choose a single word"):
            learned(wrong)
    with pytest.raises(ValueError, match="not \\[tokens, width\\]"):
        WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="", vectors=nn.Parameter(torch.zeros(4))
        )
    with pytest.raises(ValueError, match="not float32"):
        WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="", vectors=nn.Parameter(torch.zeros(1, 4).bfloat16())
        )


def test_placeholders_that_cannot_be_told_apart(model):
    model.add_embedding(learned("<fox>"))
    model.add_embedding(learned("ink"))
    for placeholder, why in (("<fox>", "is given twice"), ("<ink>", "'ink' is part of '<ink>'")):
        with pytest.raises(ConfigError, match=why):
            model.add_embedding(learned(placeholder))
    assert [e.placeholder for e in model.all_embeddings()] == ["<fox>", "ink"]


@BOTH
def test_export_and_reload_change_no_bit(model, tmp_path, is_output):
    fox = WanModelEmbedding.initial(
        model, placeholder=FOX, is_output_embedding=is_output, initial_text="red", seed=3
    )
    with torch.no_grad():
        fox.vectors.add_(torch.randn(fox.vectors.shape) * 1e-6)
    path = WanModelSaver().save_embedding(fox, tmp_path / "a.safetensors", facts={"steps": 5})
    back = WanModelEmbedding.from_file(path, width=64)
    assert torch.equal(back.vectors, fox.vectors) and not back.vectors.requires_grad
    fields = ("placeholder", "name", "uuid", "is_output_embedding", "initial_text")
    assert all(getattr(back, name) == getattr(fox, name) for name in fields)
    model.add_embedding(fox)
    want = model.encode_prompt("a <fox> runs").detach()
    model.embedding = back
    assert torch.equal(model.encode_prompt("a <fox> runs"), want)
    twice = WanModelSaver().save_embedding(
        back, tmp_path / "b.safetensors", facts={"steps": 5}, date=DATE
    )
    again = WanModelSaver().save_embedding(
        fox, tmp_path / "c.safetensors", facts={"steps": 5}, date=DATE
    )
    assert twice.read_bytes() == again.read_bytes()


def test_what_a_run_may_ask_of_a_file(tmp_path):
    path = WanModelSaver().save_embedding(learned(), tmp_path / "a.safetensors")
    other = WanModelEmbedding.from_file(path, placeholder="<ocelot>", name="cat")
    assert (other.placeholder, other.name, other.uuid) == ("<ocelot>", "cat", "uuid of <fox>")
    assert WanModelEmbedding.from_file(path, placeholder="<ocelot>").name == "ocelot"
    with pytest.raises(CheckpointError, match="for another text encoder"):
        WanModelEmbedding.from_file(path, width=4096)


def test_files_of_others_are_called_by_their_name(tmp_path):
    values = torch.randn(1, 64).half()
    save_file({"t5": values}, tmp_path / "ocelot.safetensors")
    embedding = WanModelEmbedding.from_file(tmp_path / "ocelot.safetensors")
    assert (embedding.placeholder, embedding.name) == ("ocelot", "ocelot")
    assert torch.equal(embedding.vectors, values.float()) and embedding.initial_text is None
    again = WanModelEmbedding.from_file(tmp_path / "ocelot.safetensors")
    assert embedding.uuid == again.uuid
    save_file({"t5": values}, tmp_path / "my ocelot.safetensors")
    with pytest.raises(ConfigError, match=r"my ocelot.*has a space.*gives its own name"):
        WanModelEmbedding.from_file(tmp_path / "my ocelot.safetensors")


@pytest.mark.parametrize(
    "values",
    [torch.zeros(0, 64), torch.zeros(2, 64, dtype=torch.int32), torch.full((2, 64), torch.nan)],
    ids=["none", "integers", "nan"],
)
def test_damaged_files(tmp_path, values):
    save_file({"umt5xxl": values}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        WanModelEmbedding.from_file(tmp_path / "a.safetensors")


def test_several_at_once_and_in_less_precision(tmp_path):
    made = [learned(), learned(INK, is_output=True, seed=1)]
    paths = WanModelSaver().save_embeddings(made, tmp_path / "new", dtype=torch.float16)
    assert [path.name for path in paths] == ["fox.safetensors", "ink.safetensors"]
    for path, embedding in zip(paths, made, strict=True):
        back = WanModelEmbedding.from_file(path)
        assert torch.equal(back.vectors, embedding.vectors.half().float())
        assert back.is_output_embedding is embedding.is_output_embedding
    with pytest.raises(ValueError, match="not all different"):
        WanModelSaver().save_embeddings([made[0], made[0]], tmp_path)
    with torch.no_grad():
        made[0].vectors[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"<fox>.*too large for torch.float16"):
        WanModelSaver().save_embedding(made[0], tmp_path / "a.safetensors", dtype=torch.float16)


def test_the_header(tmp_path):
    path = WanModelSaver().save_embedding(
        learned(),
        tmp_path / "a.safetensors",
        facts={"steps": 5, "run": "x"},
        title="Fox",
        date=DATE,
    )
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    facts = header.pop("__metadata__")
    assert list(header) == ["umt5xxl"] and header["umt5xxl"]["dtype"] == "F32"
    assert facts["modelspec.title"] == "Fox" and facts["modelspec.date"].startswith("2026-01-02")
    assert (facts["onewan.placeholder"], facts["onewan.uuid"]) == (FOX, "uuid of <fox>")
    assert (facts["onewan.steps"], facts["onewan.run"]) == ("5", "x")


def test_moving_keeps_the_parameter():
    fox = learned()
    parameter = fox.vectors
    assert fox.to("cpu") is fox and fox.vectors is parameter


# -------------------------------------------------------------------------------------- in samples


@pytest.fixture(scope="module")
def whole(folder) -> Callable[[], WanModel]:
    return cache(lambda: WanModelLoader().load(folder))


def wanted(prompt: str, negative: str = "blue circle") -> SampleRequest:
    return SampleRequest(
        prompt=prompt,
        negative_prompt=negative,
        image=None,
        width=64,
        height=32,
        frames=5,
        steps=2,
        guidance=(4.0,),
        shift=5.0,
        seed=1,
        fps=8.0,
    )


@BOTH
def test_vectors_change_the_sample_and_nothing_else(whole, is_output):
    model = whole()
    fox = learned(is_output=is_output)
    before = WanModelSampler(model).sample(wanted("a red square"))
    model.embedding = fox
    try:
        sampler = WanModelSampler(model)
        assert np.array_equal(sampler.sample(wanted("a red square")), before)
        first = sampler.sample(wanted("a <fox> square"))
        with torch.no_grad():
            fox.vectors.mul_(-3)
        second = sampler.sample(wanted("a <fox> square"))
        negative = sampler.sample(wanted("a red square", "<fox>"))
        assert np.array_equal(sampler.sample(wanted("a red square")), before)
    finally:
        model.embedding = None
    videos = [before, first, second, negative]
    for number, video in enumerate(videos):
        assert not any(np.array_equal(video, other) for other in videos[:number])
    assert fox.vectors.requires_grad and fox.vectors.grad is None


def test_no_gradient_is_recorded_while_sampling(whole, monkeypatch):
    model = whole()
    model.embedding = learned()
    recorded: list[bool] = []
    encode = UMT5EncoderModel.forward

    def watched(self: UMT5EncoderModel, *args: object, **kwargs: object) -> object:
        output = encode(self, *args, **kwargs)
        recorded.append(output.last_hidden_state.requires_grad)
        return output

    monkeypatch.setattr(UMT5EncoderModel, "forward", watched)
    try:
        WanModelSampler(model).sample(wanted("a <fox> square", "<fox>"))
        assert torch.is_grad_enabled() and recorded == [False, False]
    finally:
        model.embedding = None
